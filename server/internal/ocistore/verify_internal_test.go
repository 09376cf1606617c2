package ocistore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// TestReplacedBlobStays checks a damaged blob that a push replaces after its content was read. The registry must not
// move the new blob to the folder of damaged blobs.
func TestReplacedBlobStays(t *testing.T) {
	t.Parallel()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	content := []byte("good")
	d := digest.FromBytes(content)
	path := blobPath(d.Encoded())
	if err := s.putBytes(d, content); err != nil {
		t.Fatal(err)
	}
	if err := s.root.WriteFile(path, []byte("bad"), 0o640); err != nil {
		t.Fatal(err)
	}
	f, err := s.root.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.putBytes(d, content); err != nil {
		t.Fatal(err)
	}
	moved, err := s.moveAside(f, d)
	if got, rerr := s.root.ReadFile(path); moved || err != nil || string(got) != "good" {
		t.Errorf("moveAside() of a replaced blob = %t, %v, and the blob is %q, %v; want it kept", moved, err, got, rerr)
	}
	if err := s.root.Remove(path); err != nil {
		t.Fatal(err)
	}
	if moved, err := s.moveAside(f, d); moved || err != nil {
		t.Errorf("moveAside() of a removed blob = %t, %v; want false", moved, err)
	}
	if _, err := s.root.Stat("damaged/" + d.Encoded()); !os.IsNotExist(err) {
		t.Errorf("the folder damaged has it: %v", err)
	}
}

// flaky is a file whose reads fail.
type flaky struct{ fs.File }

func (flaky) Read([]byte) (int, error) { return 0, syscall.EIO }

// openFlaky opens a registry with n blobs and no manifest. Of each blob, as many reads as fail says return an error.
// paths has the blobs in the order in which Verify reads them.
func openFlaky(t *testing.T, n, fail int) (s *Store, paths []string) {
	t.Helper()
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		content := []byte{byte(i)}
		d := digest.FromBytes(content)
		if err := s.putBytes(d, content); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, blobPath(d.Encoded()))
	}
	slices.Sort(paths)
	failed := map[string]int{}
	s.openBlob = func(name string) (fs.File, error) {
		f, err := s.root.Open(name)
		if failed[name]++; err == nil && failed[name] <= fail && strings.HasPrefix(name, "blobs/") {
			return flaky{f}, nil
		}
		return f, err
	}
	return s, paths
}

// there reports for each path whether the file exists.
func there(t *testing.T, s *Store, paths []string) (have []bool) {
	t.Helper()
	for _, p := range paths {
		_, err := s.root.Stat(p)
		have = append(have, err == nil)
	}
	return have
}

// TestFailedReadOnce checks that Verify reads a blob again if the first read fails, before it calls the blob damaged.
func TestFailedReadOnce(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 3, 1)
	out, err := s.Verify(t.Context(), 1<<50, func(d Damage) { t.Errorf("damage %+v; want none", d) })
	if have := there(t, s, paths); err != nil || out.Damaged != 0 || slices.Contains(have, false) {
		t.Errorf("Verify() after one failed read of each blob = %+v, %v, and the blobs are there: %v; want all", out, err,
			have)
	}
}

// TestFailedReads checks a disk that fails. Verify must end at the second file in a row that it cannot read, and the
// next Verify must continue there. When the disk works again, a collection must put the content back, unless a push has
// done so.
func TestFailedReads(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 4, 4)
	for i, want := range [][]bool{{false, true, true, true}, {false, false, true, true}} {
		var found []Damage
		_, err := s.Verify(t.Context(), 1<<50, func(d Damage) { found = append(found, d) })
		have := there(t, s, paths)
		if !errors.Is(err, syscall.EIO) || len(found) != 1 || !slices.Equal(have, want) {
			t.Errorf("pass %d = %v, found %+v, and the blobs are there: %v; want EIO, one, %v", i, err, found, have, want)
		}
	}
	if err := s.root.WriteFile("damaged/"+path.Base(paths[1]), []byte("bad"), 0o640); err != nil {
		t.Fatal(err)
	}
	out, err := s.Collect(t.Context(), s.now())
	have, want := there(t, s, paths), []string{"sha256:" + path.Base(paths[0])}
	if err != nil || !slices.Equal(out.Restored, want) || !slices.Equal(have, []bool{true, false, true, true}) {
		t.Errorf("Collect() = %v, restored %v, and the blobs are there: %v; want the first one back", err, out.Restored, have)
	}
	if n := s.Damaged(); n != 0 {
		t.Errorf("Damaged() after the collection = %d; want 0", n)
	}
}

// obeyModes makes file modes hold for this goroutine, even if root runs the test.
func obeyModes(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[0].Effective &^= 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH
	if err := unix.Capset(&head, &data[0]); err != nil {
		t.Fatal(err)
	}
}

// TestUnreadablePaths checks a registry with a file that cannot be opened, a folder that cannot be listed, and a
// damaged blob that cannot be moved. Verify must still find the damaged blob that comes after them. The registry must
// count all of them until they are repaired.
func TestUnreadablePaths(t *testing.T) {
	t.Parallel()
	obeyModes(t)
	s, paths := openFlaky(t, 6, 0)
	dir := s.root.Name()
	at := func(i int) string { return dir + "/" + paths[i] }
	good, err := os.ReadFile(at(2))
	if err != nil {
		t.Fatal(err)
	}
	full := dir + "/damaged/" + path.Base(paths[2])
	if err := errors.Join(os.Chmod(at(0), 0), os.Chmod(path.Dir(at(1)), 0), os.WriteFile(at(2), []byte("bad"), 0o640),
		os.MkdirAll(full+"/x", 0o750), os.WriteFile(at(4), []byte("bad"), 0o640)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(path.Dir(at(1)), 0o750) })
	var kept, damaged []string
	verify := func() (Verified, error) {
		kept, damaged = nil, nil
		return s.Verify(t.Context(), 1<<50, func(d Damage) {
			if d.Kept != "" {
				kept = append(kept, d.Kept)
			} else {
				damaged = append(damaged, d.Digest)
			}
		})
	}
	out, err := verify()
	wantKept := []string{paths[0], path.Dir(paths[1]), paths[2]}
	if !errors.Is(err, fs.ErrPermission) || !slices.Equal(kept, wantKept) || out.Blobs != 5 ||
		!slices.Equal(damaged, []string{"sha256:" + path.Base(paths[4])}) {
		t.Errorf("Verify() = %+v, %v, kept %v, damaged %v; want %v kept and the fifth blob damaged", out, err, kept, damaged,
			wantKept)
	}
	// No manifest needs the damaged blob, so it does not count. After a restart, it counts until a collection has found
	// that out.
	for _, want := range []int{3, 4} {
		if n, next := s.Damaged(), s.NextPass(); n != want || next.After(time.Now()) {
			t.Errorf("Damaged() = %d, NextPass() = %v; want %d, and a time in the past", n, next, want)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s, err = Open(dir, Options{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if out, err := verify(); !errors.Is(err, fs.ErrPermission) || len(kept)+len(damaged) != 0 || out.Blobs != 2 {
		t.Errorf("Verify() again = %+v, %v, kept %v, damaged %v; want only the 2 unreadable files read, and nothing new", out,
			err, kept, damaged)
	}
	if err := errors.Join(os.Chmod(at(0), 0o640), os.Chmod(path.Dir(at(1)), 0o750), os.WriteFile(at(2), good, 0o640),
		os.RemoveAll(full)); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(); err != nil || len(kept)+len(damaged) != 0 || out.Blobs != 3 || s.Damaged() != 1 {
		t.Errorf("Verify() after the repair = %+v, %v, kept %v, damaged %v, Damaged() = %d; want 3 read, 1 damaged", out, err,
			kept, damaged, s.Damaged())
	}
	if next := s.NextPass(); time.Until(next) < 29*24*time.Hour {
		t.Errorf("NextPass() after the repair = %v; want 30 days after the pass", next)
	}
}

// openUnreadable opens a registry with n blobs that cannot be opened, unless repaired has their paths. The paths are
// sorted.
func openUnreadable(t *testing.T, n int) (s *Store, paths []string, repaired map[string]bool) {
	t.Helper()
	s, _ = openFlaky(t, 0, 0)
	for i := range n {
		content := fmt.Appendf(nil, "%d", i)
		paths = append(paths, blobPath(digest.FromBytes(content).Encoded()))
		file := s.root.Name() + "/" + paths[i]
		if err := errors.Join(os.MkdirAll(path.Dir(file), 0o750), os.WriteFile(file, content, 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(paths)
	repaired = map[string]bool{}
	opened := s.openBlob
	s.openBlob = func(name string) (fs.File, error) {
		if !repaired[name] {
			return nil, syscall.EACCES
		}
		return opened(name)
	}
	return s, paths, repaired
}

// TestAllUnreadable has files that all cannot be opened. Verify must stop at the limit, and note no file beyond it,
// however often it is called. It must go on when files were repaired, and read all of them when it can.
func TestAllUnreadable(t *testing.T) {
	t.Parallel()
	s, paths, repaired := openUnreadable(t, maxUnread+5)
	for i, pass := range []struct{ repair, want int }{{0, maxUnread}, {0, 0}, {2, 2}, {0, 0}} {
		for _, name := range paths[:pass.repair] {
			repaired[name] = true
		}
		found := 0
		out, err := s.Verify(t.Context(), 1<<50, func(Damage) { found++ })
		if n := s.Damaged(); !errors.Is(err, syscall.EACCES) || found != pass.want || out.Damaged != 0 || n != maxUnread {
			t.Errorf("pass %d = %+v, %v, reports %d, Damaged() = %d; want EACCES, %d reports, and %d", i, out, err, found, n,
				pass.want, maxUnread)
		}
	}
	for _, name := range paths {
		repaired[name] = true
	}
	for range 2 { // the first call reads what the earlier ones could not, and the rest
		if _, err := s.Verify(t.Context(), 1<<50, func(d Damage) { t.Errorf("damage %+v; want none", d) }); err != nil {
			t.Error(err)
		}
		if n := s.Damaged(); n != 0 {
			t.Errorf("Damaged() = %d; want 0", n)
		}
	}
	if next := s.NextPass(); next.Before(time.Now()) {
		t.Errorf("NextPass() = %v; want a time in the future", next)
	}
}

// TestUnreadableFolder has a folder that cannot be listed at first. When it can, its files cannot be opened, and Verify
// stops among them at the limit. It must note that a part of the folder was not read.
func TestUnreadableFolder(t *testing.T) {
	t.Parallel()
	obeyModes(t)
	s, paths, _ := openUnreadable(t, maxUnread+100)
	first := path.Dir(paths[0])
	if path.Dir(paths[1]) != first {
		t.Fatalf("%s and %s are in two folders, so this test proves nothing", paths[0], paths[1])
	}
	folder := s.root.Name() + "/" + first
	t.Cleanup(func() { _ = os.Chmod(folder, 0o750) })
	for _, mode := range []fs.FileMode{0, 0o750} {
		if err := os.Chmod(folder, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Verify(t.Context(), 1<<50, func(Damage) {}); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("Verify() with mode %v of the folder = %v; want an error", mode, err)
		}
		if kept := s.readPlace().Kept; !slices.Contains(kept, first) || len(kept) > maxUnread+1 {
			t.Errorf("with mode %v, %d paths are noted; want at most %d, and folder %s", mode, len(kept), maxUnread+1, first)
		}
	}
}

// TestCollectBesideUnreadableManifest checks a damaged manifest that was moved aside and cannot be read. It is not
// known which blobs this manifest needs, so a collection must remove none. It must still report all damage.
func TestCollectBesideUnreadableManifest(t *testing.T) {
	t.Parallel()
	s, paths := openFlaky(t, 1, 0)
	push := func(layer string) digest.Digest {
		t.Helper()
		blob := digest.FromString(layer)
		if err := s.putBytes(blob, []byte(layer)); err != nil {
			t.Fatal(err)
		}
		const kind = "application/vnd.oci.image.manifest.v1+json"
		desc, err := s.PushManifest(t.Context(), "a/x", "", fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,`+
			`"config":{"mediaType":"x/y","digest":%q,"size":%d},"layers":[]}`, kind, blob, len(layer)), kind)
		if err != nil {
			t.Fatal(err)
		}
		return digest.Digest(desc.Digest)
	}
	var all []digest.Digest
	for i := range 4 {
		all = append(all, push(fmt.Sprint("layer ", i)))
	}
	slices.Sort(all)
	// Manifests are read in the order of their digests: the unreadable one comes first, and the one with the lost blob
	// last.
	unread, last := all[0], all[3]
	_, content, err := s.readManifest("a/x", ociregistry.Digest(last))
	if err != nil {
		t.Fatal(err)
	}
	var m manifest
	if err := json.Unmarshal(content, &m); err != nil {
		t.Fatal(err)
	}
	lost := m.Config.Digest
	aside := "damaged/" + unread.Encoded()
	if err := errors.Join(s.root.Remove(blobPath(lost.Encoded())), s.root.Remove(blobPath(unread.Encoded())),
		s.root.Symlink(".", aside)); err != nil { // the link leads to a folder, which cannot be read as a file
		t.Fatal(err)
	}
	later := time.Now().Add(25 * time.Hour)
	for range 2 {
		out, err := s.Collect(t.Context(), later)
		if err == nil || out.Blobs != 0 || !slices.Equal(out.Damaged, []string{string(unread)}) ||
			len(out.DamagedBlobs) != 1 || out.DamagedBlobs[0].Digest != string(lost) {
			t.Errorf("Collect() = %+v, %v; want an error, no blob removed, manifest %s damaged, and blob %s lost", out, err,
				unread, lost)
		}
		if n := s.Damaged(); n != 2 {
			t.Errorf("Damaged() = %d; want 2", n)
		}
	}
	if have := there(t, s, append(paths, blobPath(all[1].Encoded()))); slices.Contains(have, false) {
		t.Errorf("the blobs are there: %v; want all, also the one that no manifest needs", have)
	}
	if err := errors.Join(s.root.Remove(aside), s.root.WriteFile(aside, []byte("{"), 0o640)); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Collect(t.Context(), later); err != nil || out.Blobs == 0 {
		t.Errorf("Collect() when the manifest can be read = %+v, %v; want the unneeded blob removed", out, err)
	}
}

// TestPlaceWhole checks how the position of a verification is stored: a new file must replace the former one. If the
// former file were changed, a crash or a full disk could leave a file without the position.
func TestPlaceWhole(t *testing.T) {
	t.Parallel()
	s, _ := openFlaky(t, 0, 0)
	if err := errors.Join(s.writePlace(place{After: "first"}), s.root.Link(placeFile, "former"),
		s.writePlace(place{After: "second"})); err != nil {
		t.Fatal(err)
	}
	if former, err := s.root.ReadFile("former"); err != nil || !strings.Contains(string(former), "first") {
		t.Errorf("the former file = %s, %v; want it unchanged", former, err)
	}
	if p := s.readPlace(); p.After != "second" {
		t.Errorf("readPlace() = %+v; want the second place", p)
	}
	if left, err := fs.ReadDir(s.root.FS(), "tmp"); err != nil || len(left) != 0 {
		t.Errorf("temporary files: %v, %v; want none", left, err)
	}
}
