package main

import (
	"bytes"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// run executes one command and returns its exit code and its output.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Run(t.Context(), root(), append([]string{"builder"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

// TestOperator checks exit code and hint for common mistakes of operators.
func TestOperator(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	if code, out, errs := run(t, "keygen", key); code != 0 || !strings.Contains(out, key+".pub") {
		t.Fatalf("keygen = %d %s%s", code, out, errs)
	}
	bucket := filepath.Join(dir, "bucket")
	if err := os.Mkdir(bucket, 0o755); err != nil {
		t.Fatal(err)
	}
	build := func(more ...string) []string {
		return append([]string{"build", "--build-id", "17800.0.9", "--driver", "535.261.03", "--kernel-mirror",
			"file://" + bucket, "--driver-mirror", "file://" + bucket,
			"--to", "oci:" + filepath.Join(dir, "layout"), "--key", key, "--cache", filepath.Join(dir, "cache")}, more...)
	}
	work := func(more ...string) []string {
		return append([]string{"work", "--to", "oci:" + filepath.Join(dir, "layout"), "--key", key, "--cache",
			filepath.Join(dir, "cache"), "--state", filepath.Join(dir, "state")}, more...)
	}
	keys, none, away := filepath.Join(dir, "keys"), filepath.Join(dir, "none"), "http://127.0.0.1:1"
	if code, out, errs := run(t, "snapshot", "keys", keys); code != 0 {
		t.Fatalf("snapshot keys = %d %s%s", code, out, errs)
	}
	rows := []struct {
		name string
		args []string
		code int
		err  string // a part of stderr
	}{
		// All settings must be checked before the first request.
		{"a key that is not there", build("--key", none), 2, "hint:  make a key with: builder keygen"},
		{"a module's key that is not there", build("--module-key", none, "--module-cert", none), 2, "module signing key"},
		{"a destination that is none", build("--to", "registry.example/UPPER"), 2, "registry.example/UPPER"},
		{"a worker's key that is not there", work("--queue", "mysql://x", "--key", none), 2,
			"hint:  make a key with: builder keygen"},
		{"a snapshot that is not there",
			[]string{"bundle", "create", none + ".tar", "--from", "127.0.0.1:1/x", "--snapshot", none}, 2, "is not a folder"},
		{"no keys of roles", []string{"snapshot", "root", "--to", none, "--root-key", none}, 2,
			"no key is given for the role targets"},
		{"a snapshot's folder that is a file",
			[]string{"snapshot", "make", "--to", key, "--server", away, "--keys", keys}, 2, "give a folder in which"},
		{"an artifact without a tag, and a key that is not there",
			[]string{"reproduce", "--public-key", key + ".pub", "--attest", "--key", none, "registry.example/x"}, 2,
			"neither a digest nor a tag"},
		{"no key file name", []string{"keygen"}, 2, "hint:  run: builder keygen"},
		{"key is there", []string{"keygen", key}, 2, "hint:  use another name"},
		{"no flags", []string{"build"}, 2, "build-id"},
		{"bad BUILD_ID", build("--build-id", "x"), 2, "hint:  see builder build --help"},
		{"bad driver", build("--driver", "new"), 2, "hint:  see builder build --help"},
		{"bad flavour", build("--flavour", "sweet"), 2, "hint:  see builder build --help"},
		{"bad load test", build("--load-test", "maybe"), 2, "auto, require or off"},
		{"bad mode of Google's signatures", build("--google-signatures", "maybe"), 2, "auto, require or off"},
		{"two signatures for a module", build("--google-signatures", "require", "--module-key", key, "--module-cert", key), 2,
			"--module-key has no effect with --google-signatures require"},
		{"Google's modules, signed again", build("--google-modules", "--module-key", key), 2,
			"--module-key has no effect with --google-modules"},
		{"Google's modules, with types", build("--google-modules", "--btf"), 2, "--btf has no effect with --google-modules"},
		{"a certificate without its key", build("--module-cert", key), 2, "--module-key and --module-cert go together"},
		{"COS build that the bucket lacks", build(), fault.InputMissing.ExitCode(), "hint:  check BUILD_ID"},
		{"no queue", work(), 2, "queue"},
		{"queue that is none", work("--queue", "mysql://x"), 2, "hint:  use sqlite:///abs/path/queue.db"},
		{"age with a queue", work("--queue", "sqlite:///x/queue.db", "--max-age", "40"), 2,
			"hint:  leave out --max-age; to rebuild old artifacts, start this command from a timer: builder build --wish " +
				"FILE --max-age 40"},
		{"unknown command", []string{"frobnicate"}, 2, "no command"},
	}
	for _, row := range rows {
		code, out, errs := run(t, row.args...)
		if code != row.code || out != "" || !strings.Contains(errs, row.err) {
			t.Errorf("%s: %v = %d\n%s%s\nwant %d with %q and nothing on stdout", row.name, row.args, code, out, errs, row.code,
				row.err)
		}
	}
	// The log of the failed build must have the same error, and no lock file may be left.
	logs, err := filepath.Glob(filepath.Join(dir, "cache", "logs", "*.log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("logs = %v, %v; want one", logs, err)
	}
	if text, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(text), "build failed (input-missing)") {
		t.Errorf("log = %q, %v", text, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "cache", "owners", "*")); err != nil || len(left) > 0 {
		t.Errorf("owners left in the cache: %v, %v", left, err)
	}
}

// TestEmbedded checks that the server's own registry gets the API's token, and that no other registry gets it.
func TestEmbedded(t *testing.T) {
	t.Parallel()
	server, err := url.Parse("http://prebake.svc:8440")
	if err != nil {
		t.Fatal(err)
	}
	named := registry.Options{Username: "me", Password: "mine"}
	rows := []struct {
		destination      string
		configured, want registry.Options
	}{
		{"prebake.svc:8440/prebake/driver", registry.Options{},
			registry.Options{Username: "token", Password: "secret", Plain: true}},
		{"prebake.svc:8440/prebake/driver", named, registry.Options{Username: "me", Password: "mine", Plain: true}},
		{"prebake.svc/prebake/driver", registry.Options{}, registry.Options{}},
		{"ghcr.io/x/prebake.svc:8440", named, named},
		{"oci:/x", registry.Options{}, registry.Options{}},
	}
	for _, row := range rows {
		got := addServerToken(server, func() (string, error) { return "secret", nil },
			func(string) registry.Options { return row.configured })(row.destination)
		if diff := cmp.Diff(row.want, got); diff != "" {
			t.Errorf("options of %s (-want +got):\n%s", row.destination, diff)
		}
	}
}

// TestHelp checks that help fits a terminal and that each flag is in a group.
func TestHelp(t *testing.T) {
	t.Parallel()
	if err := cli.CheckHelp(root); err != nil {
		t.Error(err)
	}
}
