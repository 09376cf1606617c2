package gpus_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/gpus"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
)

var driver = target.Driver{Version: "535.261.03", Flavour: target.Open}

func release(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, gpulist.File)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestStatement makes the signed statement about GPUs from a release's list. Then it reads the list back from the
// statement, as a node does.
func TestStatement(t *testing.T) {
	t.Parallel()
	list, err := gpus.Read(release(t,
		`{"chips":[{"devid":"0x1EB8","name":"Tesla T4","features":["kernelopen"]},{"devid":"0x1DB1","name":"Tesla V100","features":[]}]}`), driver.Version)
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(key); err != nil {
		t.Fatal(err)
	}
	signer, err := sign.LoadSigner(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	digest := "sha256:" + strings.Repeat("ab", 32)
	st, err := gpus.Statement(digest, driver, list)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := sign.Bundle(t.Context(), signer, st)
	if err != nil {
		t.Fatal(err)
	}
	v, err := signer.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.Statement(raw)
	if err != nil || got.PredicateType != gpulist.PredicateType || !got.About(digest) {
		t.Fatalf("Statement = %+v, %v", got, err)
	}
	read, err := gpulist.ParsePredicate(got.Predicate)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(list.Short(), read); diff != "" {
		t.Errorf("list (-want +got):\n%s", diff)
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	if l, err := gpus.Read(t.TempDir(), driver.Version); l != nil || err != nil {
		t.Errorf("Read(release without a list) = %v, %v; want neither", l, err)
	}
	for name, text := range map[string]string{"broken": "{", "too long": strings.Repeat(" ", gpulist.MaxFile+1)} {
		if l, err := gpus.Read(release(t, text), driver.Version); !fault.Is(err, fault.Unverified) {
			t.Errorf("%s: Read = %v, %v; want kind unverified", name, l, err)
		}
	}
	out := release(t, "{}")
	if err := os.Remove(filepath.Join(out, gpulist.File)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(out, gpulist.File)); err != nil {
		t.Fatal(err)
	}
	if l, err := gpus.Read(out, driver.Version); err == nil {
		t.Errorf("Read(link out of the release) = %v; want an error", l)
	}
}

func TestTooLarge(t *testing.T) {
	t.Parallel()
	l := &gpulist.List{Version: driver.Version}
	for i := range 20_000 {
		l.Chips = append(l.Chips, gpulist.Chip{Device: "0x" + hex(i), Legacy: "470.256.02"})
	}
	if st, err := gpus.Statement("sha256:"+strings.Repeat("ab", 32), driver, l); !fault.Is(err, fault.Unsupported) {
		t.Errorf("Statement(20,000 products) = %d bytes, %v; want kind unsupported", len(st.JSON()), err)
	}
}

func hex(i int) string {
	const digits = "0123456789abcdef"
	return string([]byte{digits[i>>12&15], digits[i>>8&15], digits[i>>4&15], digits[i&15]})
}
