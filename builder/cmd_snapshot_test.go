package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
)

// TestSnapshot runs the snapshot commands in the order in which their help lists them. After each step, a node's client
// must accept the list.
func TestSnapshot(t *testing.T) {
	t.Parallel()
	digest := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	all := []api.Artifact{{Digest: digest("1"), State: api.Published},
		{Digest: digest("2"), State: api.Yanked, Reason: "panics on unload"}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/artifacts" {
			t.Errorf("asked for %s", r.URL)
		}
		if err := json.NewEncoder(w).Encode(all); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	keys, list := filepath.Join(dir, "keys"), filepath.Join(dir, "list")
	does := func(want string, args ...string) string {
		t.Helper()
		code, out, errs := run(t, append([]string{"snapshot"}, args...)...)
		if code != 0 || !strings.Contains(out, want) {
			t.Fatalf("snapshot %v = %d %s%s; want %q", args, code, out, errs, want)
		}
		return out
	}
	does("root-3.key", "keys", keys)
	// The operator keeps the third root key offline, so only its public key stays in the folder.
	if err := os.Remove(filepath.Join(keys, "root-3.key")); err != nil {
		t.Fatal(err)
	}
	does("1.root.json", "root", "--to", list, "--keys", keys, "--threshold", "2")
	root, err := os.ReadFile(filepath.Join(list, "1.root.json"))
	if err != nil {
		t.Fatal(err)
	}
	does("published 1\nyanked    1\n", "make", "--to", list, "--keys", keys, "--server", server.URL)
	state := filepath.Join(dir, "state.json")
	takes := func(version int64, second snapshot.State) (refreshed int64) {
		t.Helper()
		c, err := snapshot.New(snapshot.Config{From: list, Root: root, State: state})
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.Refresh(t.Context())
		if err != nil {
			t.Fatalf("Refresh = %v", err)
		}
		if a, _ := s.Find(digest("2")); s.Version != version || a.State != second {
			t.Errorf("Refresh = version %d, %+v; want %d, %s", s.Version, a, version, second)
		}
		return s.Refreshed
	}
	before := takes(1, snapshot.Yanked)
	out := does(`"refreshed"`, "refresh", "--to", list, "--keys", keys, "--output", "json")
	refreshed := takes(1, snapshot.Yanked)
	if want := fmt.Sprintf(`"refreshed": %d,`, refreshed); refreshed <= before || !strings.Contains(out, want) {
		t.Errorf("refresh after %d printed %s; want %s", before, out, want)
	}
	all[1].State = api.Quarantined
	does("list      7,", "make", "--to", list, "--keys", keys, "--server", server.URL, "--least-version", "7")
	takes(7, snapshot.Quarantined)
	// The operator replaces the timestamp key and one root key.
	if code, out, errs := run(t, "keygen", filepath.Join(dir, "next.key")); code != 0 {
		t.Fatalf("keygen = %d %s%s", code, out, errs)
	}
	does("2.root.json", "root", "--to", list, "--keys", keys, "--timestamp-key", filepath.Join(dir, "next.key.pub"),
		"--root-key", filepath.Join(keys, "root-1.key"), "--root-key", filepath.Join(dir, "next.key"), "--former-key",
		filepath.Join(keys, "root-2.key"))
	all[1].State = api.Yanked
	does("list      8,", "make", "--to", list, "--keys", keys, "--timestamp-key", filepath.Join(dir, "next.key"),
		"--server", server.URL)
	newest := takes(8, snapshot.Yanked)

	for _, row := range []struct {
		name string
		args []string
		kind fault.Kind
		err  string
	}{
		{"no folder", []string{"make", "--keys", keys, "--server", server.URL}, fault.Usage, "--to"},
		{"no server", []string{"make", "--keys", keys, "--to", list}, fault.Usage, "--server"},
		{"no key", []string{"refresh", "--to", list}, fault.Usage, "hint:  add --keys FOLDER, or --timestamp-key KEY"},
		{"a public key that is to sign",
			[]string{"refresh", "--to", list, "--timestamp-key", filepath.Join(dir, "next.key.pub")}, fault.Usage,
			"cannot sign"},
		{"the timestamp key that was replaced", []string{"refresh", "--to", list, "--keys", keys}, fault.Usage,
			"sign with the keys that the newest root lists"},
		{"too few root keys", []string{"root", "--to", list, "--keys", keys, "--root-key", filepath.Join(keys, "root-1.key"),
			"--root-key", filepath.Join(dir, "next.key.pub")}, fault.Usage, "too few keys"},
		{"a threshold of more than there are", []string{"root", "--to", list, "--keys", keys, "--threshold", "4"},
			fault.Usage, "the threshold is 4, but there are 3 root keys"},
		{"no list yet", []string{"refresh", "--to", filepath.Join(dir, "new"), "--keys", keys}, fault.Usage,
			"builder snapshot make"},
		{"no root yet", []string{"make", "--to", filepath.Join(dir, "new"), "--keys", keys, "--server", server.URL},
			fault.Usage, "builder snapshot root"},
		{"keys that are there", []string{"keys", keys}, fault.Usage, "use another name"},
		{"no life", []string{"refresh", "--to", list, "--keys", keys, "--life", "-1h"}, fault.Usage,
			"want a duration of a minute or more"},
		{"a keyless key", []string{"refresh", "--to", list, "--timestamp-key", "keyless:x"}, fault.Usage,
			"a snapshot cannot be signed keyless"},
	} {
		code, _, errs := run(t, append([]string{"snapshot"}, row.args...)...)
		if code != row.kind.ExitCode() || !strings.Contains(errs, row.err) {
			t.Errorf("%s: snapshot %v = %d %s; want %d and %q", row.name, row.args, code, errs, row.kind.ExitCode(), row.err)
		}
	}
	all = all[1:]
	if code, _, errs := run(t, "snapshot", "make", "--to", list, "--keys", keys, "--timestamp-key",
		filepath.Join(dir, "next.key"), "--server", server.URL); code != fault.NoArtifact.ExitCode() {
		t.Errorf("make without published artifacts = %d %s; want no artifact", code, errs)
	}
	if got := takes(8, snapshot.Yanked); got != newest { // the failed commands published nothing
		t.Errorf("after the failed commands the timestamp has version %d; want %d", got, newest)
	}
}
