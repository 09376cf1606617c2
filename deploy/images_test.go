package deploy_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// These scripts stand in for programs that images.sh runs. buildah writes what the real one writes outside of its own
// storage: digests and archives. It also writes a file as mirror and builder do when root runs them: only root can open
// it.
var imagePrograms = map[string]string{
	"buildah": `#!/bin/bash
set -eu
(umask 077; mkdir -p "$PREBAKE_STATE/build"; : >"$PREBAKE_STATE/build/lock")
while (($# > 0)); do
  case $1 in
    --digestfile) printf 'sha256:%064d' 1 >"$2" ;;
    oci-archive:*) archive=${1#oci-archive:}; : >"${archive%%:*}" ;;
    inspect) printf '"architecture": "amd64"\n"architecture": "arm64"\n' ;;
    mount) echo "$PREBAKE_STATE/build" ;;
  esac
  shift
done
`,
	"bwrap": "#!/bin/sh\nprintf 'ok    qemu amd64 x\\nok    qemu arm64 x\\n'\n",
	// sudo notes the command. The test then runs it as root.
	"sudo": "#!/bin/bash\nprintf '%s\\0' \"$@\" >\"$PREBAKE_STATE/sudo\"\n",
}

// imageTree makes a folder with images.sh, the programs that it puts into images, and imagePrograms. It returns the
// folder, and the environment for the script.
func imageTree(t *testing.T) (dir string, env []string) {
	t.Helper()
	dir = t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	write("deploy/images.sh", read(t, "deploy/images.sh"))
	for _, name := range []string{"builder", "server", "fetcher", "nvmlprobe", "guestinit", "guestinit-arm64",
		"nvmlprobe-arm64", "fetcher-arm64"} {
		write("bin/"+name, "#!/bin/sh\n")
	}
	for name, text := range imagePrograms {
		write("path/"+name, text)
	}
	write("state/.keep", "")
	return dir, []string{"PATH=" + filepath.Join(dir, "path") + ":" + os.Getenv("PATH"), "HOME=" + dir,
		"PREBAKE_STATE=" + filepath.Join(dir, "state"), "BASE_IMAGE=localhost/base"}
}

// TestImagesGiveFilesBack starts images.sh as a user without rights. The script goes on as root. At its end, the user
// must own each file in the folders of the user.
func TestImagesGiveFilesBack(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can start a program as another user")
	}
	const user = 65534
	dir, env := imageTree(t)
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // made by os.MkdirTemp
		t.Fatal(err)
	}
	each := func(see func(path string, info fs.FileInfo) error) {
		t.Helper()
		if err := filepath.Walk(dir, func(path string, info fs.FileInfo, err error) error {
			if err != nil {
				return err
			}
			return see(path, info)
		}); err != nil {
			t.Fatal(err)
		}
	}
	each(func(path string, _ fs.FileInfo) error { return os.Lchown(path, user, user) })
	started := exec.CommandContext(t.Context(), "deploy/images.sh", "--arm64")
	started.Dir, started.Env = dir, env
	started.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	if said, err := started.CombinedOutput(); err != nil {
		t.Fatalf("images.sh as user %d: %v\n%s", user, err, said)
	}
	asked, err := os.ReadFile(filepath.Join(dir, "state", "sudo"))
	if err != nil {
		t.Fatalf("images.sh as user %d did not call sudo: %v", user, err)
	}
	asRoot := exec.CommandContext(t.Context(), "env", strings.Split(strings.TrimSuffix(string(asked), "\x00"), "\x00")...)
	asRoot.Dir, asRoot.Env = dir, env
	if said, err := asRoot.CombinedOutput(); err != nil {
		t.Fatalf("images.sh as root: %v\n%s", err, said)
	}
	each(func(path string, info fs.FileInfo) error {
		if of, ok := info.Sys().(*syscall.Stat_t); !ok || of.Uid != user {
			t.Errorf("%s belongs to root; want it to belong to the user who started images.sh", path)
		}
		return nil
	})
	for _, name := range []string{"state/build/lock", "bin/images/fetcher.tar", "bin/images/builder-arm64.tar"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Errorf("images.sh did not write %s, so the test proves nothing: %v", name, err)
		}
	}
}

// TestImagesLines checks that each line for the overlay that images.sh --arm64 prints names an image that the manifests
// have. kustomize ignores a line for another image.
func TestImagesLines(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("images.sh builds images only as root")
	}
	dir, env := imageTree(t)
	cmd := exec.CommandContext(t.Context(), "deploy/images.sh", "--arm64")
	cmd.Dir, cmd.Env = dir, env
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("images.sh --arm64: %v\n%s", err, said.String())
	}
	used := map[string]bool{}
	for _, m := range manifests(t) {
		for _, c := range m.Spec.Template.Spec.Containers {
			name, _, _ := strings.Cut(c.Image, ":")
			used[name] = true
		}
	}
	lines := regexp.MustCompile(`(?m)^  - \{name: (\S+), newName: REGISTRY/(\S+), digest: "sha256:0+1"\}$`).
		FindAllStringSubmatch(string(out), -1)
	if len(lines) != 2 {
		t.Fatalf("images.sh --arm64 printed %d lines for the overlay; want 2:\n%s", len(lines), out)
	}
	got := ""
	for _, line := range lines {
		if !used[line[1]] {
			t.Errorf("the line for %s does nothing: the manifests have the images %v", line[1], used)
		}
		got += line[2] + " "
	}
	if want := "builder-arm64 fetcher "; got != want {
		t.Errorf("images.sh --arm64 printed lines for %q; want %q", got, want)
	}
}
