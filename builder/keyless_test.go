package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/testkit"
)

// TestKeylessFlags checks the flags for keyless signing: tokens, trusted roots and identities. It is not parallel,
// because it sets an environment variable.
func TestKeylessFlags(t *testing.T) {
	t.Setenv(envToken, "")
	dir := t.TempDir()
	file := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	farm := testkit.NewAuthority(t)
	trusted := file("trusted_root.json", farm.Root(t, nil, nil))
	fresh := testkit.Token(t, "https://login.example.com", "farm@example.com", time.Now().Add(time.Hour))
	token, empty := file("token", append(fresh, '\n')), file("empty", []byte("\n"))
	ref := sign.PrefixKeyless + testkit.SigningConfig(t, farm.ServeCertificates(t), farm.ServeTime(t))
	key := filepath.Join(dir, "key")
	if code, out, errs := run(t, "keygen", key); code != 0 {
		t.Fatalf("keygen = %d %s%s", code, out, errs)
	}

	// try runs doctor and returns its finding about the key. The other findings depend on the machine.
	try := func(args ...string) (level, text string) {
		_, out, errs := run(t, append([]string{"doctor", "--cache", filepath.Join(dir, "cache"), "--output", "json", "--key",
			ref, "--trusted-root", trusted}, args...)...)
		var r doctor.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("doctor %v = %s%s: %v", args, out, errs, err)
		}
		for _, f := range r.Findings {
			if f.Check == "key" {
				return string(f.Level), f.Text + f.Next
			}
		}
		t.Fatalf("doctor %v = %s; want a finding about the key", args, out)
		return "", ""
	}
	if level, text := try("--identity-token", token); level != string(doctor.OK) {
		t.Errorf("with a token in a file: %s %s", level, text)
	}
	for name, args := range map[string][]string{"none": nil, "in no file": {"--identity-token", token + "x"},
		"in an empty file": {"--identity-token", empty}} {
		if level, text := try(args...); level == string(doctor.OK) || !strings.Contains(text, "--identity-token FILE") {
			t.Errorf("token %s: %s %s; want a hint", name, level, text)
		}
	}
	t.Setenv(envToken, string(fresh))
	if level, text := try(); level != string(doctor.OK) {
		t.Errorf("with a token in the environment: %s %s", level, text)
	}

	build := func(more ...string) []string {
		return append([]string{"build", "--build-id", "17800.0.9", "--to", "oci:" + filepath.Join(dir, "layout"), "--cache",
			filepath.Join(dir, "cache")}, more...)
	}
	reproduce := func(more ...string) []string {
		return append([]string{"reproduce", "oci:" + filepath.Join(dir, "none") + ":tag", "--cache",
			filepath.Join(dir, "cache")}, more...)
	}
	someone := []string{"--certificate-identity", "farm@example.com", "--certificate-oidc-issuer",
		"https://login.example.com"}
	for _, row := range []struct {
		name string
		args []string
		err  string
	}{
		{"no root", build("--key", ref), "missing: --trusted-root"},
		{"another root", build("--key", ref, "--trusted-root", key), "hint:  give a Sigstore trusted_root.json"},
		{"a token for a key", build("--key", key, "--identity-token", token), "--identity-token has no effect"},
		{"nobody to believe", reproduce(), "hint:  for a key, add --public-key FILE; for a keyless"},
		{"an identity, and no root", reproduce(someone...), "missing: --trusted-root"},
		{"a root, and no identity", reproduce("--trusted-root", trusted), "hint:  for a key, add --public-key FILE; for a"},
		{"an identity without issuer", reproduce("--trusted-root", trusted, "--certificate-identity", "x"),
			"give the subject and the issuer"},
		{"attesting without root", reproduce("--public-key", key+".pub", "--attest", "--key", ref),
			"missing: --trusted-root"},
	} {
		if code, out, errs := run(t, row.args...); code != 2 || out != "" || !strings.Contains(errs, row.err) {
			t.Errorf("%s: %v = %d\n%s%s\nwant 2 with %q and nothing on stdout", row.name, row.args, code, out, errs, row.err)
		}
	}
	// These flags are complete, so the only error is that the artifact does not exist.
	if code, _, errs := run(t,
		reproduce(append(someone, "--trusted-root", trusted, "--attest", "--key", ref)...)...); code == 2 || code == 0 {
		t.Errorf("reproduce with complete flags = %d %s; want an error about the missing artifact", code, errs)
	}
}
