package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

func TestNotes(t *testing.T) {
	t.Parallel()
	changelog := "# Changes\n\n## Unreleased\n\n- next\n\n## v1.2.0 (2026-01-02)\n\n- a\n- b\n\n## 1.1.0\n\n- old\n"
	for version, want := range map[string]string{
		"v1.2.0": "# Prebake v1.2.0\n\n- a\n- b\n",
		"v1.1.0": "# Prebake v1.1.0\n\n- old\n",
		"abc":    "# Prebake abc\n\n- next\n",
	} {
		if got, err := releaseNotes([]byte(changelog), version); err != nil || string(got) != want {
			t.Errorf("releaseNotes(%s) = %q, %v; want %q", version, got, err, want)
		}
	}
	if got, err := releaseNotes([]byte("# Changes\n"), "v1"); !fault.Is(err, fault.Usage) {
		t.Errorf("releaseNotes of nothing = %q, %v; want %v", got, err, fault.Usage)
	}
}

// TestFlags checks that the Makefile compiles with the flags of a release. Otherwise each package that a program uses
// is compiled twice in a run of all tests.
func TestFlags(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "\nexport GOFLAGS := ")
	line, _, _ := strings.Cut(after, "\n")
	for flag := range strings.FieldsSeq(goFlags) {
		if !slices.Contains(strings.Fields(line), flag) {
			t.Errorf("the Makefile's GOFLAGS are %q; want %s among them, as in goFlags", line, flag)
		}
	}
}

// TestRemovable checks that a folder with content is replaced only if it is a release.
func TestRemovable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := checkRemovable(dir); err != nil {
		t.Errorf("checkRemovable(empty) = %v; want nil", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkRemovable(dir); !fault.Is(err, fault.Usage) {
		t.Errorf("checkRemovable(something) = %v; want %v", err, fault.Usage)
	}
	// Many folders have a checksums file, so it alone does not make a folder a release.
	for _, name := range []string{sumsFile, provenanceFile} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := checkRemovable(dir); !fault.Is(err, fault.Usage) {
			t.Errorf("checkRemovable(with %s) = %v; want %v", name, err, fault.Usage)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, signatureDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkRemovable(dir); err != nil {
		t.Errorf("checkRemovable(release) = %v; want nil", err)
	}
}

// TestOfCommit checks that readCommit reads the commit's time from git, and that it refuses uncommitted changes.
func TestOfCommit(t *testing.T) {
	dir := t.TempDir()
	git := func(args ...string) {
		t.Helper()
		env := []string{
			"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com",
			"GIT_COMMITTER_DATE=1700000000 +0100", "GIT_CONFIG_GLOBAL=/dev/null",
		}
		if _, err := output(t.Context(), dir, env, "git", args...); err != nil {
			t.Fatal(err)
		}
	}
	git("init", "-q")
	git("commit", "-q", "--allow-empty", "-m", "first")
	git("tag", "v9.9.9")
	t.Setenv("SOURCE_DATE_EPOCH", "")
	c := config{source: dir}
	err := c.readCommit(t.Context())
	if err != nil || c.version != "v9.9.9" || len(c.commit) != 40 || c.date.Unix() != 1_700_000_000 {
		t.Errorf("readCommit = %v, %+v; want v9.9.9 of 1700000000", err, c)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1600000000")
	if err := c.readCommit(t.Context()); err != nil || c.date.Unix() != 1_600_000_000 {
		t.Errorf("readCommit with SOURCE_DATE_EPOCH = %v, %v; want 1600000000", err, c.date)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "soon")
	if err := c.readCommit(t.Context()); !fault.Is(err, fault.Usage) {
		t.Errorf("readCommit with SOURCE_DATE_EPOCH=soon = %v; want %v", err, fault.Usage)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "")
	if err := c.check(t.Context()); err != nil {
		t.Errorf("check of the same commit = %v; want nil", err)
	}
	git("commit", "-q", "--allow-empty", "-m", "second")
	if err := c.check(t.Context()); !fault.Is(err, fault.Usage) {
		t.Errorf("check of a later commit = %v; want %v", err, fault.Usage)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A new file counts as a change, even if the user's own git settings hide the file.
	hide := filepath.Join(t.TempDir(), "hide")
	if err := os.WriteFile(hide, []byte("x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	git("config", "status.showUntrackedFiles", "no")
	git("config", "core.excludesFile", hide)
	if err := c.readCommit(t.Context()); !fault.Is(err, fault.Usage) {
		t.Errorf("readCommit with a change = %v; want %v", err, fault.Usage)
	}
	if got, err := c.trackedFiles(t.Context(), "."); err != nil || len(got) != 0 {
		t.Errorf("trackedFiles = %q, %v; want nothing, since x is not committed", got, err)
	}
}

// TestSameGo checks that the release program must be compiled by the Go release in go.mod.
func TestSameGo(t *testing.T) {
	t.Parallel()
	c := config{source: "../.."}
	want, err := c.goVersion(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.checkGo(t.Context(), want); err != nil {
		t.Errorf("checkGo(%s) = %v; want nil", want, err)
	}
	for _, running := range []string{"go1.999.0", want + "1", want + " X:x", "devel"} {
		err := c.checkGo(t.Context(), running)
		if !fault.Is(err, fault.Usage) || !strings.Contains(fault.Hint(err), "GOTOOLCHAIN="+want+" make release") {
			t.Errorf("checkGo(%s) = %v, hint %q; want %v with the command", running, err, fault.Hint(err), fault.Usage)
		}
	}
}
