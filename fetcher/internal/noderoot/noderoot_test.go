package noderoot_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
)

// TestFollowsAsTheKernelDoes compares how this package and the kernel (openat2 with RESOLVE_IN_ROOT) follow links, on
// random folders and links.
func TestFollowsAsTheKernelDoes(t *testing.T) {
	t.Parallel()
	found := 0
	for seed := range 60 {
		random := rand.New(rand.NewPCG(uint64(seed), 1))
		dir := t.TempDir()
		paths := tree(t, random, dir)
		node, err := noderoot.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range paths {
			want, kerr := kernelReads(dir, name)
			if errors.Is(kerr, unix.ENOSYS) {
				t.Skip("this kernel has no openat2")
			}
			got, err := fs.ReadFile(node.FS(), name)
			if (err == nil) != (kerr == nil) || string(got) != want {
				t.Errorf("tree %d: read %s = %q, %v; the kernel reads %q, %v", seed, name, got, err, want, kerr)
			}
			if node.Exists(name) != kernelHas(dir, name) {
				t.Errorf("tree %d: Exists(%s) = %v; the kernel says otherwise", seed, name, node.Exists(name))
			}
			if kerr == nil {
				found++
			}
			on, err := node.Path(name)
			if err == nil && kerr == nil {
				if raw, err := os.ReadFile(on); err != nil || string(raw) != want {
					t.Errorf("tree %d: %s is %s on this side, with %q, %v; want %q", seed, name, on, raw, err, want)
				}
			}
		}
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	}
	if found < 500 {
		t.Errorf("%d names led to a file; that is too few to say anything", found)
	}
}

// tree makes random folders, files and links. It returns the names to look up.
func tree(t *testing.T, random *rand.Rand, dir string) (names []string) {
	t.Helper()
	folders := []string{"."}
	pick := func(from []string) string { return from[random.IntN(len(from))] }
	for i := range 40 {
		name := path.Join(pick(folders), fmt.Sprintf("%c%d", "dfl"[i%3], i))
		var err error
		switch i % 3 {
		case 0:
			err = os.Mkdir(filepath.Join(dir, name), 0o755)
			folders = append(folders, name)
		case 1:
			err = os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644)
		case 2:
			to := pick(append(names, "gone", name))
			switch random.IntN(4) {
			case 0:
				to = "/" + to
			case 1:
				to = "/../../" + to
			case 2:
				to = "../../../../.." + path.Join("/", to)
			}
			if err = os.Symlink(to, filepath.Join(dir, name)); err == nil {
				folders = append(folders, name) // the link may lead to a folder
			}
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // the parent is a link that leads to no folder
		}
		if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrPermission) {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	for range 40 {
		names = append(names, path.Join(pick(folders), path.Base(pick(names))))
	}
	return names
}

func kernelReads(dir, name string) (string, error) {
	root, err := os.Open(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{Flags: unix.O_RDONLY, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	raw, err := io.ReadAll(f)
	return string(raw), err
}

func kernelHas(dir, name string) bool {
	root, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return false
	}
	return unix.Close(fd) == nil
}

// TestStaysInside checks that no write leaves the root. It also checks that Lstat and ReadLink do not follow a link
// that is the last part of the name.
func TestStaysInside(t *testing.T) {
	t.Parallel()
	outside, dir := t.TempDir(), t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(outside, "theirs"), []byte("x"), 0o644),
		os.Symlink(outside, filepath.Join(dir, "out")),
		os.Symlink("/made", filepath.Join(dir, "in"))); err != nil {
		t.Fatal(err)
	}
	node, err := noderoot.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if err := node.Set("out/theirs", []byte("y")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Set through a link that leads outside: %v; want that nothing is there", err)
	}
	if err := node.MakeFolder("/in/below", 0o755); err != nil {
		t.Errorf("MakeFolder through an absolute link: %v", err)
	}
	if info, err := os.Stat(filepath.Join(dir, "made/below")); err != nil || !info.IsDir() {
		t.Errorf("made/below: %v; want the folder that the link leads to", err)
	}
	if info, err := node.Lstat("in"); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("Lstat of a link: %v, %v; want the link", info, err)
	}
	if to, err := fs.ReadLink(node.FS(), "in"); err != nil || to != "/made" {
		t.Errorf("ReadLink = %q, %v; want what the link says", to, err)
	}
	if raw, err := os.ReadFile(filepath.Join(outside, "theirs")); err != nil || string(raw) != "x" {
		t.Errorf("the file outside has %q, %v; want it untouched", raw, err)
	}
}
