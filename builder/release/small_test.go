package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// testCommit is the git commit that test releases claim. No such commit exists.
var testCommit = strings.Repeat("c", 40)

// debFile puts a new Debian package into an archive. It returns the package's line for packages.lock.
func debFile(t *testing.T, archive, name, arch string, files map[string]string, links map[string]string) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil { // dpkg-deb refuses another mode of DEBIAN's parent
		t.Fatal(err)
	}
	write := func(file, text string) {
		t.Helper()
		path := filepath.Join(root, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("DEBIAN/control", fmt.Sprintf(
		"Package: %s\nVersion: 1:2+3\nArchitecture: %s\nMaintainer: nobody <nobody@example.com>\nDescription: test\n",
		name, arch,
	))
	for file, text := range files {
		write(file, text)
	}
	for link, to := range links {
		path := filepath.Join(root, link)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
	}
	pool := fmt.Sprintf("pool/main/%s_2+3_%s.deb", name, arch)
	to := filepath.Join(archive, pool)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := output(t.Context(), "", nil, "dpkg-deb", "--root-owner-group", "--build", root, to); err != nil {
		t.Fatal(err)
	}
	sum, size, err := fileSum(to)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s %s %d %s\n", arch, sum, size, pool)
}

// smallConfig returns the configuration of a release with few Debian packages, for this machine's architecture.
func smallConfig(t *testing.T) config {
	t.Helper()
	dir := t.TempDir()
	archive := filepath.Join(dir, "archive")
	lock := "# a comment\n" +
		debFile(t, archive, "ca-certificates", "all", map[string]string{
			certificateDir + "/B.crt": "second", certificateDir + "/A.crt": "first\n",
			"usr/share/doc/ca-certificates/copyright": "licence",
		}, nil) +
		debFile(t, archive, "base-passwd", "all", map[string]string{
			masterDir + "/passwd.master": "root:x:0:0\n", masterDir + "/group.master": "root:x:0:\n",
		}, nil) +
		debFile(t, archive, "mawk", runtime.GOARCH, map[string]string{
			"usr/bin/mawk": "awk", "bin/dash": "shell",
			"usr/share/doc/mawk/changelog.gz": "x", "usr/share/man/man1/mawk.1.gz": "x",
		}, map[string]string{"bin/sh": "dash"}) +
		debFile(t, archive, "other", "other", map[string]string{"usr/bin/other": "of another architecture"}, nil)
	file := filepath.Join(dir, "packages.lock")
	if err := os.WriteFile(file, []byte(lock), 0o600); err != nil {
		t.Fatal(err)
	}
	return config{
		source: "../..", version: "v0.0.1", commit: testCommit, date: time.Unix(1_700_000_000, 0).UTC(),
		arches: []string{runtime.GOARCH}, lock: file, archives: []string{archive}, cache: filepath.Join(dir, "cache"),
		builderID: "https://example.com/release", say: t.Logf,
	}
}
