package localbuild_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// script returns a Builder whose program is a shell script with this body. The script makes keys, and records each call
// in the file calls.
func script(t *testing.T, body string) localbuild.Builder {
	t.Helper()
	return scriptWith(t, makesKey, body)
}

// makesKey is shell code that makes both halves of a key.
const makesKey = `for f in "$2" "$2.pub"; do printf -- '-----BEGIN X-----\n-----END X-----\n' >"$f"; done`

// scriptWith does what script does, with this shell code instead of makesKey.
func scriptWith(t *testing.T, keygen, body string) localbuild.Builder {
	t.Helper()
	dir := t.TempDir()
	builder := filepath.Join(dir, "builder")
	text := "#!/bin/sh\nset -e\necho \"$@\" >>\"${0%/*}\"/calls\nif [ \"$1\" = keygen ]; then " + keygen +
		"; exit 0; fi\n" + body + "\n"
	program.Write(t, builder, []byte(text))
	return localbuild.Builder{Program: builder, StateDir: filepath.Join(dir, "state"),
		CacheDir: filepath.Join(dir, "cache"), KernelMirror: "file:///k", DriverMirror: "file:///d"}
}

// build compiles, and then releases the artifact at once, so that the next compile may start.
func build(ctx context.Context, b localbuild.Builder, q resolve.Question) (resolve.Answer, error) {
	a, release, err := b.Build(ctx, q)
	if err == nil {
		err = release()
	}
	return a, err
}

var question = resolve.Question{Kernel: target.Kernel{BuildID: "1.2.3", Board: "lakitu"}, Wish: "R535", Flavour: "open"}

func TestBuild(t *testing.T) {
	t.Parallel()
	b := script(t, `echo "  ok  compile" >&2; echo '{"digest":"sha256:ab","driver":{"version":"535.1.1","flavour":"open"}}'`)
	var said []string
	b.Progress = func(line string) { said = append(said, line) }
	for range 2 { // at the second compile, the key exists
		a, err := build(t.Context(), b, question)
		if err != nil {
			t.Fatal(err)
		}
		if a.Digest != "sha256:ab" || a.Driver.Version != "535.1.1" || a.Source != "local" ||
			a.Repository != "oci:"+b.StateDir+"/local" {
			t.Errorf("Build = %+v", a)
		}
	}
	if pem, err := localbuild.PublicKey(b.StateDir); err != nil || !strings.HasPrefix(string(pem), "-----BEGIN X") {
		t.Errorf("PublicKey = %q, %v", pem, err)
	}
	raw, err := os.ReadFile(filepath.Join(filepath.Dir(b.Program), "calls"))
	if err != nil {
		t.Fatal(err)
	}
	build := "build --build-id 1.2.3 --board lakitu --driver R535 --flavour open --to oci:STATE/local --key " +
		"STATE/node-key/local.key --cache " + b.CacheDir +
		" --load-test off --output json --jobs N --kernel-mirror file:///k --driver-mirror file:///d"
	want := []string{"keygen STATE/tmp-key/local.key", build, build}
	calls := regexp.MustCompile("--jobs [1-9][0-9]*").ReplaceAllString(string(raw), "--jobs N") // depends on the machine
	got := strings.Split(strings.TrimSpace(strings.ReplaceAll(calls, b.StateDir, "STATE")), "\n")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if len(said) != 2 || said[0] != "  ok  compile" {
		t.Errorf("said %q", said)
	}
}

func TestBuildFails(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name, body string
		kind       fault.Kind
		text, hint string
	}{
		{"kind and words of the builder", `echo "error: too few arguments" >&2; echo "hint:  take another" >&2; exit 23`,
			fault.APIBreak, "too few arguments", "take another"},
		{"a killed compiler", `echo "error: cc1 was killed" >&2; echo "hint:  fewer --jobs" >&2; exit 26`, fault.OutOfMemory,
			"cc1 was killed", "--builder never"},
		{"no words", `exit 27`, fault.DiskFull, "status 27", ""},
		{"unknown status", `exit 99`, fault.Internal, "status 99", ""},
		{"no JSON", `echo done`, fault.Internal, "has no digest", "same release"},
		{"no digest", `echo '{}'`, fault.Internal, "has no digest", "same release"},
		{"output without end", `exec yes`, fault.Internal, "more than 4 MiB", "same release"},
	}
	for _, row := range rows {
		_, err := build(t.Context(), script(t, row.body), question)
		if err == nil || fault.Of(err) != row.kind || !strings.Contains(err.Error(), row.text) ||
			!strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: Build = %v (%v, hint %q); want %v with %q", row.name, err, fault.Of(err), fault.Hint(err), row.kind,
				row.text)
		}
	}
	b := script(t, "exit 0")
	b.Program = filepath.Join(t.TempDir(), "none")
	if _, err := build(t.Context(), b, question); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
		t.Errorf("Build without a program = %v; want usage with a hint", err)
	}
}

func TestBuildStops(t *testing.T) {
	t.Parallel()
	// Cancel the compile as soon as the builder prints that it runs.
	b := script(t, `trap 'exit 0' TERM; echo running >&2; while :; do sleep 0.05; done`)
	ctx, cancel := context.WithCancel(t.Context())
	b.Progress = func(string) { cancel() }
	if _, err := build(ctx, b, question); !fault.Is(err, fault.Cancelled) {
		t.Errorf("Build = %v; want cancelled", err)
	}
}

// TestHalfAKey checks that an incomplete key of the node is replaced, and that the artifacts of an earlier run are
// removed.
func TestHalfAKey(t *testing.T) {
	t.Parallel()
	const pem = "-----BEGIN X-----\n-----END X-----\n"
	for name, files := range map[string]map[string]string{
		"half a folder":  {"node-key/local.key": pem},
		"an older one":   {"local.key": pem, "local.key.pub": ""},
		"no public half": {"local.key": pem},
		"empty":          {"local.key": "", "local.key.pub": pem},
		"cut short":      {"local.key": pem[:20], "local.key.pub": pem},
		"empty public":   {"local.key": pem, "local.key.pub": ""},
		"left over":      {"tmp-key": pem[:20], "tmp-key.pub": pem},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := script(t, `echo '{"digest":"sha256:ab","driver":{"version":"535.1.1","flavour":"open"}}'`)
			old := filepath.Join(b.StateDir, "local", "blobs")
			if err := os.MkdirAll(old, 0o755); err != nil {
				t.Fatal(err)
			}
			for name, text := range files {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(b.StateDir, name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(b.StateDir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := build(t.Context(), b, question); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"node-key/local.key", "node-key/local.key.pub"} {
				if got, err := os.ReadFile(filepath.Join(b.StateDir, name)); err != nil || string(got) != pem {
					t.Errorf("%s = %q, %v; want a complete key", name, got, err)
				}
			}
			if _, err := os.Stat(old); !os.IsNotExist(err) {
				t.Errorf("what an earlier run published is still there: %v", err)
			}
		})
	}
}

// TestOneCompileAtATime checks that a second compile on the same node gets the error Busy and changes nothing.
// Otherwise it would remove the artifact of the first compile. This holds until the first one releases its artifact.
func TestOneCompileAtATime(t *testing.T) {
	t.Parallel()
	b := script(t, `while [ ! -e "${0%/*}/end" ]; do echo compiling >&2; sleep 0.05; done
echo '{"digest":"sha256:ab","driver":{"version":"535.1.1","flavour":"open"}}'`)
	made := filepath.Join(b.StateDir, "local", "made")
	second := func(when string) {
		t.Helper()
		other := b
		other.Progress = nil
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := build(ctx, other, question); !fault.Is(err, fault.Busy) {
			t.Errorf("a second compile %s the first = %v; want busy", when, err)
		}
		if _, err := os.Stat(made); err != nil {
			t.Errorf("what the first compile made, %s it: %v", when, err)
		}
	}
	var once sync.Once
	b.Progress = func(string) {
		once.Do(func() {
			if err := errors.Join(os.MkdirAll(filepath.Dir(made), 0o700), os.WriteFile(made, nil, 0o600)); err != nil {
				t.Error(err)
			}
			second("during")
			if err := os.WriteFile(filepath.Join(filepath.Dir(b.Program), "end"), nil, 0o600); err != nil {
				t.Error(err)
			}
		})
	}
	_, release, err := b.Build(t.Context(), question)
	if err != nil {
		t.Fatal(err)
	}
	second("after")
	for range 2 { // the second call must do nothing
		if err := release(); err != nil {
			t.Error(err)
		}
	}
	if _, err := build(t.Context(), b, question); err != nil {
		t.Errorf("a compile once the artifact is staged = %v; want success", err)
	}
}

// TestFailedCompileHoldsNothing checks that the next compile may start after a failed one.
func TestFailedCompileHoldsNothing(t *testing.T) {
	t.Parallel()
	b := script(t, "exit 10")
	for range 2 {
		if _, release, err := b.Build(t.Context(), question); !fault.Is(err, fault.Transient) || release != nil {
			t.Errorf("Build = %v; want transient, and nothing to release", err)
		}
	}
}
