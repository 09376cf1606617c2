package cossrc_test

import (
	"archive/tar"
	"bytes"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/ulikunitz/xz"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const tree = "usr/src/linux-headers-6.1.0-9-test/"

// headerFiles returns a small header tree. A name ending in * is executable. Content beginning with -> makes a link.
func headerFiles() map[string]string {
	return map[string]string{
		tree + "Makefile":                       "all:\n",
		tree + ".config":                        "CONFIG_64BIT=y\n",
		tree + "Module.symvers":                 "0x00000000\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n",
		tree + "include/config/kernel.release":  "6.1.0-9-test\n",
		tree + "include/generated/utsrelease.h": "#define UTS_RELEASE \"6.1.0-9-test\"\n",
		tree + "include/generated/utsversion.h": "#define UTS_VERSION \"#1 SMP Thu Jan  1 00:00:00 UTC 2026\"\n",
		tree + "include/generated/compile.h":    "#define LINUX_COMPILE_HOST \"a\"\n",
		tree + "include/linux/module.h":         "struct module;\n",
		tree + "scripts/mod/modpost*":           "ELF",
		tree + "include/asm":                    "-> linux",
	}
}

func toolchainFiles() map[string]string {
	return map[string]string{"bin/x86_64-cros-linux-gnu-gcc*": "ELF gcc", "bin/cc": "-> x86_64-cros-linux-gnu-gcc",
		"lib/libgcc.a": "archive"}
}

func tarOf(t testing.TB, files map[string]string, when time.Time, uid int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		body := files[name]
		h := &tar.Header{Name: "./" + strings.TrimSuffix(name, "*"), Typeflag: tar.TypeReg, Mode: 0o644,
			Size: int64(len(body)), ModTime: when, Uid: uid, Gid: uid}
		if strings.HasSuffix(name, "*") {
			h.Mode = 0o755
		}
		if to, ok := strings.CutPrefix(body, "-> "); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, to, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func packed(t testing.TB, w io.WriteCloser, err error, b *bytes.Buffer, data []byte) []byte {
	t.Helper()
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func tgz(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	return packed(t, gzip.NewWriter(&b), nil, &b, data)
}

func txz(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	// For the default dictionary of 8 MiB, the library allocates 48 MB, and clears them, for each archive.
	w, err := xz.WriterConfig{DictCap: 64 << 10}.NewWriter(&b)
	return packed(t, w, err, &b, data)
}

// release returns the objects of one COS build, by their names in the build's folder.
func release(t testing.TB, headers, toolchain map[string]string, when time.Time, uid int) map[string][]byte {
	return map[string][]byte{
		"kernel-headers.tgz": tgz(t, tarOf(t, headers, when, uid)),
		"toolchain.tar.xz":   txz(t, tarOf(t, toolchain, when, uid)),
		"toolchain_env":      []byte("CC=x86_64-cros-linux-gnu-gcc\nCXX=\"x86_64-cros-linux-gnu-g++\"\n"),
		"kernel_commit":      []byte("0123456789abcdef0123456789abcdef01234567\n"),
	}
}

var day = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// writeObjects writes the objects of a COS build, and the MD5 checksum of each, into dir. dir stands for a bucket.
func writeObjects(t testing.TB, dir, build string, objects map[string][]byte) {
	t.Helper()
	at := filepath.Join(dir, build, "lakitu")
	errs := []error{os.MkdirAll(at, 0o755)}
	for name, data := range objects {
		errs = append(errs,
			os.WriteFile(filepath.Join(at, name), data, 0o644),
			os.WriteFile(filepath.Join(at, name+".md5"), fmt.Appendf(nil, "%x", md5.Sum(data)), 0o644))
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

type bench struct {
	dir    string
	bucket *cosbucket.Bucket
	cache  *cas.Cache
	said   []string
}

// openEmpty opens a bucket and a new cache. The test's end closes both.
func openEmpty(t testing.TB, bucketURL string) (*cosbucket.Bucket, *cas.Cache) {
	t.Helper()
	bucket, err := cosbucket.Open(t.Context(), bucketURL)
	if err != nil {
		t.Fatal(err)
	}
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(bucket.Close(), cache.Close()); err != nil {
			t.Error(err)
		}
	})
	return bucket, cache
}

func newBench(t testing.TB) *bench {
	t.Helper()
	dir := t.TempDir()
	bucket, cache := openEmpty(t, "file://"+dir)
	return &bench{dir: dir, bucket: bucket, cache: cache}
}

func (b *bench) fetch(t testing.TB, build string) (*cossrc.Inputs, error) {
	t.Helper()
	b.said = nil
	return cossrc.Fetch(t.Context(), b.bucket, b.cache, build, "lakitu",
		func(line string) { b.said = append(b.said, line) })
}

func TestFetch(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	objects := release(t, headerFiles(), toolchainFiles(), day, 0)
	objects["prebake-boot.tgz"] = tgz(t,
		tarOf(t, map[string]string{"vmlinuz": "kernel", "modules/order": "virtio.ko\n"}, day, 0))
	writeObjects(t, b.dir, "17800.0.9", objects)
	in, err := b.fetch(t, "17800.0.9")
	if err != nil {
		t.Fatal(err)
	}
	wantKernel := target.Kernel{
		BuildID: "17800.0.9", Board: "lakitu", Commit: "0123456789abcdef0123456789abcdef01234567",
		Release: "6.1.0-9-test", Version: "#1 SMP Thu Jan  1 00:00:00 UTC 2026", Arch: target.AMD64,
	}
	if diff := cmp.Diff(wantKernel, in.Kernel); diff != "" {
		t.Errorf("kernel (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{"CC": "x86_64-cros-linux-gnu-gcc", "CXX": "x86_64-cros-linux-gnu-g++"},
		in.Env); diff != "" {
		t.Errorf("env (-want +got):\n%s", diff)
	}
	for _, file := range []string{filepath.Join(in.Headers, "Makefile"), filepath.Join(in.Toolchain, "bin", "cc"),
		filepath.Join(in.Boot, "vmlinuz")} {
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
	}
	var names []string
	for _, m := range in.Materials {
		names = append(names, m.Name)
		if m.Unverified || !strings.HasPrefix(m.URI, "file://") || m.Size == 0 {
			t.Errorf("material %+v", m)
		}
	}
	if diff := cmp.Diff([]string{"kernel-headers.tgz", "toolchain.tar.xz", "toolchain_env", "kernel_commit",
		"prebake-boot.tgz"}, names); diff != "" {
		t.Errorf("materials (-want +got):\n%s", diff)
	}
	digest, err := cas.DigestTree(t.Context(), in.Toolchain, nil)
	if err != nil {
		t.Fatal(err)
	}
	if in.ToolchainDigest != digest {
		t.Errorf("ToolchainDigest = %s; want %s", in.ToolchainDigest, digest)
	}
	if _, err := target.ParseFingerprint(in.HeadersDigest); err != nil || in.HeadersDigest == digest {
		t.Errorf("HeadersDigest = %s, %v; want a digest other than the toolchain's", in.HeadersDigest, err)
	}
	if got, err := cossrc.Fingerprint(in.Headers, digest, in.Env); err != nil || got != in.Fingerprint {
		t.Errorf("Fingerprint = %s, %v; want what Fetch says: %s", got, err, in.Fingerprint)
	}
	again, err := b.fetch(t, "17800.0.9")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(in, again); diff != "" {
		t.Errorf("second run (-first +second):\n%s", diff)
	}
	for _, line := range b.said {
		if !strings.Contains(line, "unchanged") {
			t.Errorf("second run: %s", line)
		}
	}
}

// TestFingerprint changes one input of a COS build at a time. Some inputs must change the fingerprint, and others must
// not.
func TestFingerprint(t *testing.T) {
	t.Parallel()
	set := func(name, body string) func(h, tc map[string]string, o map[string][]byte) {
		return func(h, _ map[string]string, _ map[string][]byte) { h[tree+name] = body }
	}
	rows := []struct {
		name   string
		change func(h, tc map[string]string, o map[string][]byte)
		when   time.Time
		uid    int
		same   bool
	}{
		{name: "nothing", same: true},
		{name: "times", when: day.Add(time.Hour), same: true},
		{name: "owner", uid: 1000, same: true},
		{name: "utsversion.h", change: set("include/generated/utsversion.h", "#define UTS_VERSION \"#2 SMP\"\n"), same: true},
		{name: "compile.h", change: set("include/generated/compile.h", "#define LINUX_COMPILE_HOST \"b\"\n"), same: true},
		{name: "commit", change: func(_, _ map[string]string, o map[string][]byte) {
			o["kernel_commit"] = []byte("ffff456789abcdef0123456789abcdef01234567\n")
		}, same: true},
		{name: "packing", change: func(_, _ map[string]string, o map[string][]byte) { o["kernel-headers.tgz"] = nil },
			same: true},
		{name: "order and quotes of toolchain_env", change: func(_, _ map[string]string, o map[string][]byte) {
			o["toolchain_env"] = []byte("\nCXX=x86_64-cros-linux-gnu-g++\nCC='x86_64-cros-linux-gnu-gcc'")
		}, same: true},
		{name: "a header's byte", change: set("include/linux/module.h", "struct modulf;\n")},
		{name: "compile.h elsewhere", change: set("include/linux/compile.h", "x")},
		{name: "Module.symvers", change: set("Module.symvers", "0x00000001\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n")},
		{name: ".config", change: set(".config", "CONFIG_64BIT=n\n")},
		{name: "link", change: set("include/asm", "-> config")},
		{name: "executable bit", change: func(h, _ map[string]string, _ map[string][]byte) {
			delete(h, tree+"scripts/mod/modpost*")
			h[tree+"scripts/mod/modpost"] = "ELF"
		}},
		{name: "a file more", change: set("include/linux/new.h", "")},
		{name: "a file less", change: func(h, _ map[string]string, _ map[string][]byte) {
			delete(h,
				tree+"include/linux/module.h")
		}},
		{name: "compiler", change: func(_, tc map[string]string, _ map[string][]byte) {
			tc["bin/x86_64-cros-linux-gnu-gcc*"] = "ELF gcd"
		}},
		{name: "toolchain_env", change: func(_, _ map[string]string, o map[string][]byte) {
			o["toolchain_env"] = []byte("CC=x86_64-cros-linux-gnu-clang\nCXX=x86_64-cros-linux-gnu-g++\n")
		}},
	}
	var base target.Fingerprint
	for _, r := range rows {
		b := newBench(t)
		h, tc := headerFiles(), toolchainFiles()
		changed := map[string][]byte{}
		if r.change != nil {
			r.change(h, tc, changed)
		}
		if r.when.IsZero() {
			r.when = day
		}
		objects := release(t, h, tc, r.when, r.uid)
		for name, data := range changed {
			if data == nil { // same content, compressed with xz and not with gzip
				data = txz(t, tarOf(t, h, r.when, r.uid))
			}
			objects[name] = data
		}
		writeObjects(t, b.dir, "17800.0.9", objects)
		in, err := b.fetch(t, "17800.0.9")
		if err != nil {
			t.Errorf("%s: %v", r.name, err)
			continue
		}
		if base == "" {
			base = in.Fingerprint
		}
		if _, err := target.ParseFingerprint(string(in.Fingerprint)); err != nil || (in.Fingerprint == base) != r.same {
			t.Errorf("%s changed: fingerprint %s, %v, same %t; want same %t", r.name, in.Fingerprint, err,
				in.Fingerprint == base, r.same)
		}
	}
	// Nodes search for published artifacts by the fingerprint. If it changes, no node finds an existing artifact.
	if want :=
		target.Fingerprint("sha256:6866f2e7d30d976270d18df370b872174504aa92fed2251cffbf2e93b0625f82"); base != want {
		t.Errorf("fingerprint = %s; want %s", base, want)
	}
}

func TestFetchRefuses(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		build  string
		change func(t *testing.T, o map[string][]byte)
		after  func(dir string) error
		kind   fault.Kind
		text   string
	}{
		{name: "no such build", build: "17800.0.1", kind: fault.InputMissing, text: "17800.0.1"},
		{name: "not a build", build: "../x", kind: fault.Usage, text: "BUILD_ID"},
		{name: "no headers", change: func(_ *testing.T, o map[string][]byte) { delete(o, "kernel-headers.tgz") },
			kind: fault.InputMissing, text: "kernel-headers.tgz"},
		{name: "headers with a wrong checksum", after: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "kernel-headers.tgz.md5"), []byte(strings.Repeat("0", 32)), 0o644)
		}, kind: fault.Checksum, text: "kernel-headers.tgz"},
		{name: "toolchain with a wrong checksum", after: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "toolchain.tar.xz.md5"), []byte(strings.Repeat("0", 32)), 0o644)
		}, kind: fault.Checksum, text: "toolchain.tar.xz"},
		{name: "checksum file that is none", after: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "kernel-headers.tgz.md5"), []byte("<html>"), 0o644)
		}, kind: fault.Checksum, text: "kernel-headers.tgz"},
		{name: "env with a wrong checksum", after: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "toolchain_env"), []byte("CC=evil\n"), 0o644)
		}, kind: fault.Checksum, text: "toolchain_env"},
		{name: "commit that is none",
			change: func(_ *testing.T, o map[string][]byte) { o["kernel_commit"] = []byte("main\n") }, kind: fault.Checksum,
			text: "commit"},
		{name: "env for a shell",
			change: func(_ *testing.T, o map[string][]byte) { o["toolchain_env"] = []byte("CC=$(id)\n") },
			kind:   fault.Unsupported, text: "toolchain_env"},
		{name: "headers are no archive",
			change: func(_ *testing.T, o map[string][]byte) { o["kernel-headers.tgz"] = []byte("<html>not found</html>") },
			kind:   fault.Unverified, text: "kernel-headers.tgz"},
		{name: "no header tree", change: func(t *testing.T, o map[string][]byte) {
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, map[string]string{"usr/src/readme": "x"}, day, 0))
		}, kind: fault.Unsupported, text: "linux-headers"},
		{name: "two header trees", change: func(t *testing.T, o map[string][]byte) {
			h := headerFiles()
			h["usr/src/linux-headers-6.1.0-10-test/Makefile"] = ""
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, h, day, 0))
		}, kind: fault.Unsupported, text: "linux-headers"},
		{name: "no Module.symvers", change: func(t *testing.T, o map[string][]byte) {
			h := headerFiles()
			delete(h, tree+"Module.symvers")
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, h, day, 0))
		}, kind: fault.Unsupported, text: "Module.symvers"},
		{name: "empty Module.symvers", change: func(t *testing.T, o map[string][]byte) {
			h := headerFiles()
			h[tree+"Module.symvers"] = ""
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, h, day, 0))
		}, kind: fault.Unsupported, text: "Module.symvers"},
		{name: "header tree behind a link", change: func(t *testing.T, o map[string][]byte) {
			h := map[string]string{"usr/src/linux-headers-6.1.0-9-test": "-> ../../elsewhere"}
			for name, body := range headerFiles() {
				h["elsewhere/"+strings.TrimPrefix(name, tree)] = body
			}
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, h, day, 0))
		}, kind: fault.Unsupported, text: "is not a folder"},
		{name: "Module.symvers behind a link", change: func(t *testing.T, o map[string][]byte) {
			h := headerFiles()
			h["symvers"], h[tree+"Module.symvers"] = h[tree+"Module.symvers"], "-> ../../../symvers"
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, h, day, 0))
		}, kind: fault.Unsupported, text: "Module.symvers"},
		{name: "release that is no release", change: func(t *testing.T, o map[string][]byte) {
			h := headerFiles()
			h[tree+"include/generated/utsrelease.h"] = "#define UTS_RELEASE \"../../etc\"\n"
			o["kernel-headers.tgz"] = tgz(t, tarOf(t, h, day, 0))
		}, kind: fault.Unsupported, text: "release"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			objects := release(t, headerFiles(), toolchainFiles(), day, 0)
			if r.change != nil {
				r.change(t, objects)
			}
			writeObjects(t, b.dir, "17800.0.9", objects)
			if r.after != nil {
				if err := r.after(filepath.Join(b.dir, "17800.0.9", "lakitu")); err != nil {
					t.Fatal(err)
				}
			}
			build := r.build
			if build == "" {
				build = "17800.0.9"
			}
			_, err := b.fetch(t, build)
			if !fault.Is(err, r.kind) || !strings.Contains(err.Error(), r.text) || fault.Hint(err) == "" {
				t.Errorf("Fetch = %v (%v), hint %q; want %v, naming %s, with a hint", err, fault.Of(err), fault.Hint(err), r.kind,
					r.text)
			}
		})
	}
}

// TestDamagedArchiveIsFetchedAgain checks that an archive that is damaged in the cache is fetched again.
func TestDamagedArchiveIsFetchedAgain(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	writeObjects(t, b.dir, "17800.0.9", release(t, headerFiles(), toolchainFiles(), day, 0))
	first, err := b.fetch(t, "17800.0.9")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range first.Materials {
		file, ok := b.cache.Blob(m.Digest)
		if !ok {
			continue // the cache keeps no small objects
		}
		if err := errors.Join(os.Chmod(file, 0o644), os.WriteFile(file, []byte("rot"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(b.cache.Dir(), "trees")); err != nil {
		t.Fatal(err)
	}
	again, err := b.fetch(t, "17800.0.9")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, again); diff != "" {
		t.Errorf("inputs after the damage (-want +got):\n%s", diff)
	}
}

func TestFetchWithoutChecksums(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	writeObjects(t, b.dir, "17800.0.9", release(t, headerFiles(), toolchainFiles(), day, 0))
	for _, name := range []string{"toolchain.tar.xz.md5", "kernel_commit", "kernel_commit.md5"} {
		if err := os.Remove(filepath.Join(b.dir, "17800.0.9", "lakitu", name)); err != nil {
			t.Fatal(err)
		}
	}
	in, err := b.fetch(t, "17800.0.9")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range in.Materials {
		if m.Unverified != (m.Name == "toolchain.tar.xz") {
			t.Errorf("material %+v; want only the toolchain unverified", m)
		}
	}
	if in.Kernel.Commit != "" {
		t.Errorf("commit = %q without a kernel_commit", in.Kernel.Commit)
	}
}
