package kconfig_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
)

const text = `#
# Automatically generated file; DO NOT EDIT.
CONFIG_SMP=y
CONFIG_DRM=m
# CONFIG_PREEMPT is not set
CONFIG_HZ=250
CONFIG_CC_VERSION_TEXT="clang = 17"
XCONFIG_A=y
CONFIG_TWICE=m
CONFIG_TWICE=y
CONFIG_LAST=y`

func TestRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), ".config")
	if _, err := kconfig.ReadFile(path); !fault.Is(err, fault.InputMissing) || fault.Hint(err) == "" {
		t.Errorf("ReadFile of nothing = %v; want input-missing with a hint", err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := kconfig.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := kconfig.Config{
		"CONFIG_SMP": "y", "CONFIG_DRM": "m", "CONFIG_HZ": "250", "CONFIG_CC_VERSION_TEXT": `"clang = 17"`,
		"CONFIG_TWICE": "y", "CONFIG_LAST": "y",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ReadFile (-want +got):\n%s", diff)
	}
	for name, text := range map[string]string{"one line": strings.Repeat("x", 1<<20),
		"many lines": strings.Repeat("CONFIG_A=y\n", kconfig.Max/10)} {
		if _, err := kconfig.Read(strings.NewReader(text)); !fault.Is(err, fault.CheckFailed) || fault.Hint(err) == "" {
			t.Errorf("%s: Read = %v; want check-failed with a hint", name, err)
		}
	}
	if !got.On("CONFIG_SMP") || got.On("CONFIG_DRM") || got.On("CONFIG_PREEMPT") {
		t.Error("On: want true for SMP, and false for DRM=m and for PREEMPT")
	}
	if got := got.Text("CONFIG_CC_VERSION_TEXT"); got != "clang = 17" {
		t.Errorf("Text = %q; want it without quotes", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(text))
	f.Add([]byte("CONFIG_=\x00\nCONFIG_A=\"\n=y"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := kconfig.Parse(text)
		if err != nil && got != nil {
			t.Error("Parse returned options and an error")
		}
		for name, value := range got {
			if !strings.HasPrefix(name, "CONFIG_") || strings.Contains(name+value, "\n") {
				t.Errorf("Parse accepted %q = %q", name, value)
			}
		}
	})
}
