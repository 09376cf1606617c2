package mirror

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

func sample() tree {
	t := tree{}
	t.add("b/c/run", node{mode: 0o755, data: []byte("#!\n")})
	t.addFile("a", "text")
	t.add("b/link", node{link: "c/run"})
	t.add("b/empty", node{dir: true})
	return t
}

func TestTarIsDeterministic(t *testing.T) {
	t.Parallel()
	var sums [3]string
	for i := range sums {
		var out bytes.Buffer
		mtime := epoch
		if i == 2 {
			mtime = epoch.AddDate(0, 0, 1)
		}
		if err := sample().writeTgz(&out, "./", mtime); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(out.Bytes())
		sums[i] = hex.EncodeToString(sum[:])
	}
	if sums[0] != sums[1] {
		t.Errorf("writeTgz gave %s, then %s", sums[0], sums[1])
	}
	if sums[0] == sums[2] {
		t.Error("writeTgz ignored the time")
	}
	var out bytes.Buffer
	if err := sample().writeTar(&out, "./", epoch); err != nil {
		t.Fatal(err)
	}
	var got []string
	for tr := tar.NewReader(&out); ; {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if !hdr.ModTime.Equal(epoch) || hdr.Uid != 0 || hdr.Gid != 0 {
			t.Errorf("%s has time %v, owner %d:%d", hdr.Name, hdr.ModTime, hdr.Uid, hdr.Gid)
		}
		got = append(got, hdr.FileInfo().Mode().String()+" "+hdr.Name)
	}
	want := []string{"-rw-r--r-- ./a", "drwxr-xr-x ./b/", "drwxr-xr-x ./b/c/", "-rwxr-xr-x ./b/c/run",
		"drwxr-xr-x ./b/empty/", "Lrwxrwxrwx ./b/link"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("writeTar (-want +got)\n%s", diff)
	}
}

func TestWriteDir(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := sample().writeDir(dir); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "b/link")); err != nil || string(text) != "#!\n" {
		t.Errorf("b/link holds %q, %v", text, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "b/c/run")); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("b/c/run: %v, %v; want mode 0755", info, err)
	}
	if err := (tree{"x": {link: "/elsewhere"}, "x/y": {data: []byte("z")}}).writeDir(t.TempDir()); err == nil {
		t.Error("writeDir wrote through a link out of the folder")
	}
}

func TestReadTarRefuses(t *testing.T) {
	t.Parallel()
	everything := func(name string) string { return name }
	for _, hdr := range []tar.Header{
		{Name: "../x", Typeflag: tar.TypeReg}, {Name: "/x", Typeflag: tar.TypeReg},
		{Name: "dev", Typeflag: tar.TypeChar}, {Name: "hard", Typeflag: tar.TypeLink, Linkname: "x"},
	} {
		var out bytes.Buffer
		tw := tar.NewWriter(&out)
		if err := tw.WriteHeader(&hdr); err != nil {
			t.Fatal(err)
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		if err := readTar(tree{}, &out, everything); err == nil {
			t.Errorf("readTar(%s) succeeded; want an error", hdr.Name)
		}
	}
}

func TestStore(t *testing.T) {
	t.Parallel()
	s := store{t.TempDir()}
	r := recipe{Kind: "thing", Packages: []pkg{{"a", "1"}}}
	calls := 0
	write := func(_ context.Context, w io.Writer) error {
		calls++
		_, err := io.WriteString(w, "content")
		return err
	}
	for i, wantCached := range []bool{false, true} {
		o, err := s.make(t.Context(), r, write)
		if err != nil || o.cached != wantCached || o.Size != 7 {
			t.Errorf("make #%d = %+v, %v; want cached %v", i, o, err, wantCached)
		}
		dst := filepath.Join(t.TempDir(), "x.tgz")
		if err := o.publish(dst); err != nil {
			t.Fatal(err)
		}
		if err := writeMD5(dst, o.MD5); err != nil {
			t.Fatal(err)
		}
		sum := md5.Sum([]byte("content"))
		if text, err := os.ReadFile(dst + ".md5"); err != nil || string(text) != hex.EncodeToString(sum[:]) {
			t.Errorf("md5 file holds %q, %v", text, err)
		}
	}
	r.Packages[0].Version = "2"
	if o, err := s.make(t.Context(), r, write); err != nil || o.cached || calls != 2 {
		t.Errorf("make(another version) = %+v, %v after %d calls; want a new one", o, err, calls)
	}
	r.Kind = "broken"
	if _, err := s.make(t.Context(), r, func(_ context.Context, w io.Writer) error {
		_, _ = io.WriteString(w, "half")
		return fault.New(fault.InputMissing, "gone", "")
	}); !fault.Is(err, fault.InputMissing) {
		t.Errorf("make(failing) = %v; want input-missing", err)
	}
	left, err := filepath.Glob(filepath.Join(s.dir, "*broken*"))
	if more, err2 := filepath.Glob(filepath.Join(s.dir, ".*")); err != nil || err2 != nil || len(left)+len(more) != 0 {
		t.Errorf("a failed make left %v %v", left, more)
	}
}

// TestPublishDamagedObject checks that an object that is damaged in the cache is neither published nor kept.
func TestPublishDamagedObject(t *testing.T) {
	t.Parallel()
	s := store{t.TempDir()}
	r := recipe{Kind: "thing"}
	calls := 0
	write := func(_ context.Context, w io.Writer) error {
		calls++
		_, err := io.WriteString(w, "content")
		return err
	}
	o, err := s.make(t.Context(), r, write)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(o.path, []byte("contenu"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	if o, err = s.make(t.Context(), r, write); err != nil {
		t.Fatal(err)
	}
	if err := o.publish(filepath.Join(out, "x")); !fault.Is(err, fault.Checksum) || fault.Hint(err) == "" {
		t.Errorf("publish(damaged) = %v; want checksum-mismatch with a hint", err)
	}
	if left, err := os.ReadDir(out); err != nil || len(left) != 0 {
		t.Errorf("publish(damaged) left %v, %v", left, err)
	}
	if o, err := s.make(t.Context(), r, write); err != nil || o.cached || calls != 2 {
		t.Errorf("make afterwards = %+v, %v; want it made again", o, err)
	}
}

func TestPublishText(t *testing.T) {
	t.Parallel()
	dst := filepath.Join(t.TempDir(), "toolchain_env")
	if err := publishText(dst, toolchainEnv); err != nil {
		t.Fatal(err)
	}
	sum := md5.Sum([]byte(toolchainEnv))
	if text, err := os.ReadFile(dst + ".md5"); err != nil || string(text) != hex.EncodeToString(sum[:]) {
		t.Errorf("md5 file holds %q, %v", text, err)
	}
}
