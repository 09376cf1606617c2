package cossrc

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

func TestReadRelease(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name             string
		files            map[string]string
		release, version string
		bad              bool
	}{
		{name: "both headers", files: map[string]string{
			"include/generated/utsrelease.h": "#define UTS_RELEASE \"6.6.105+\"\n",
			"include/generated/utsversion.h": "#define UTS_VERSION \"#1 SMP\"\n",
		}, release: "6.6.105+", version: "#1 SMP"},
		{name: "the header before kernel.release", files: map[string]string{
			"include/generated/utsrelease.h": "#define UTS_RELEASE \"6.1.0-50-cloud-amd64\"\n",
			"include/config/kernel.release":  "6.1.176\n",
		}, release: "6.1.0-50-cloud-amd64"},
		{name: "kernel.release alone", files: map[string]string{"include/config/kernel.release": "5.15.63\n"},
			release: "5.15.63"},
		{name: "version in compile.h", files: map[string]string{
			"include/config/kernel.release": "5.15.63",
			"include/generated/compile.h":   "#define LINUX_COMPILE_BY \"x\"\n#define UTS_VERSION \"#7 SMP PREEMPT\"\n",
		}, release: "5.15.63", version: "#7 SMP PREEMPT"},
		{name: "neither", files: nil, bad: true},
		{name: "not a string", files: map[string]string{"include/generated/utsrelease.h": "#define UTS_RELEASE evil\n"},
			bad: true},
		{name: "folder for a release", files: map[string]string{"include/config/kernel.release": "a/b\n"}, bad: true},
		{name: "control characters", files: map[string]string{
			"include/config/kernel.release": "5.15.63", "include/generated/utsversion.h": "#define UTS_VERSION \"a\\x1bb\"\n",
		}, bad: true},
	}
	for _, r := range rows {
		dir := t.TempDir()
		for name, text := range r.files {
			file := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		release, version, err := readRelease(dir)
		if release != r.release && !r.bad || version != r.version && !r.bad || (err != nil) != r.bad || r.bad &&
			!fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: readRelease = %q, %q, %v; want %q, %q, error %t", r.name, release, version, err, r.release, r.version,
				r.bad)
		}
	}
}

func FuzzParseDefine(f *testing.F) {
	f.Add([]byte("#define UTS_RELEASE \"6.1.0\"\n"))
	f.Add([]byte("#define X\n#define UTS_RELEASE\t\"a\\\"b\" /* c */\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if value, err := parseDefine(text, "UTS_RELEASE"); err != nil && value != "" {
			t.Errorf("parseDefine(%q) = %q and %v", text, value, err)
		}
	})
}
