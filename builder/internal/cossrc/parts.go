package cossrc

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// part is one object of the COS build in the cache: an unpacked archive or a file.
type part struct {
	material Material
	pointer  Material // the object that says where this object is (see pointers); usually empty
	at       string   // path of the unpacked tree or of the file in the cache
	digest   string   // digest of the tree's content; "" if not computed
}

// remedies has the hint for each object that may be missing from the bucket.
var remedies = map[string]string{
	"kernel-headers.tgz": "check BUILD_ID and board; if they are right, give --kernel-mirror a bucket that has this " +
		"COS build",
	"toolchain.tar.xz": "put toolchain.tar.xz into the bucket; or put a file toolchain.tar.xz.gcs into the bucket, " +
		"which names the other bucket and the path where the toolchain is",
	"toolchain_env": "check BUILD_ID and board; if they are right, give --kernel-mirror a bucket that has this " +
		"COS build; for a COS build of your own, put a toolchain_env with the lines CC=… and CXX=… into the bucket",
	"vmlinux": "build without --btf, or put the kernel's vmlinux into the bucket",
}

// tryLayouts asks for an object in each layout, the likelier layout first, until the answer is not fault.InputMissing.
// If every layout lacks the object, the error has a hint from remedies.
func (f *fetcher) tryLayouts(name string, ask func(at string) error) error {
	var asked []string
	for _, at := range cosbucket.Layouts(f.kernel, name) {
		err := ask(at)
		if !fault.Is(err, fault.InputMissing) {
			return err
		}
		asked = append(asked, f.bucket.URL(at))
	}
	base := path.Base(name)
	return fault.New(fault.InputMissing,
		fmt.Sprintf("the bucket has no %s: there is no %s", base, strings.Join(asked, ", and no ")), remedies[base])
}

// readSmall reads a small object into memory. The limit is in bytes.
func (f *fetcher) readSmall(ctx context.Context, name string, limit int64) (data []byte, m Material, err error) {
	err = f.tryLayouts(name, func(at string) error {
		data, m, err = f.Small(ctx, at, limit)
		return err
	})
	return data, m, err
}

// readCommit reads kernel_commit. Old COS builds have none; then readCommit returns "".
func (f *fetcher) readCommit(ctx context.Context) (string, Material, error) {
	text, m, err := f.readSmall(ctx, cosbucket.CommitName(f.kernel), maxCommit)
	if fault.Is(err, fault.InputMissing) {
		return "", Material{}, nil
	}
	if err != nil {
		return "", Material{}, err
	}
	commit := strings.TrimSpace(string(text))
	if !target.ValidCommit(commit) {
		return "", Material{}, fault.New(fault.Checksum,
			fmt.Sprintf("read kernel_commit: %.60q is not a commit of 40 hex digits", commit),
			"write the kernel's commit, 40 hex digits, into "+m.URI)
	}
	return commit, m, nil
}

// readInfo returns the source URL in kernel_info, or "" if the COS build has no kernel_info.
func (f *fetcher) readInfo(ctx context.Context) (string, error) {
	text, _, err := f.readSmall(ctx, cosbucket.KernelInfoName(f.kernel), maxInfo)
	if fault.Is(err, fault.InputMissing) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return ParseInfo(text)
}

// unpack fetches an archive and unpacks it into the cache, unless the cache has the tree of the same archive content.
func (f *fetcher) unpack(ctx context.Context, name, kind string, o archive.Options) (p part, err error) {
	err = f.tryLayouts(name, func(at string) error {
		p, err = unpack(ctx, &f.Fetcher, at, kind, o)
		return err
	})
	return p, err
}

func unpack(ctx context.Context, f *input.Fetcher, name, kind string, o archive.Options) (part, error) {
	sum, err := f.ChecksumFile(ctx, name)
	if err != nil {
		return part{}, err
	}
	m, file, err := f.Blob(ctx, name, sum)
	if err != nil {
		return part{}, err
	}
	if m.Unverified {
		f.Progressf("%s: not verified, because the bucket has no checksum for this object", m.Name)
	}
	o.Outside = func(link, to string) {
		f.Progressf("%s: left out the link %s, because its target %s is outside the archive", m.Name, link, to)
	}
	dir, cached, err := f.Cache.Tree(ctx, kind, m.Digest, func(ctx context.Context, dir string) error {
		if err := f.Recheck(ctx, name, sum, m); err != nil {
			return err
		}
		_, err := archive.UnpackFile(ctx, file, dir, o)
		return err
	})
	if err != nil {
		return part{}, fmt.Errorf("unpack %s: %w", m.Name, err)
	}
	if !cached {
		f.Progressf("%s: unpacked", m.Name)
	}
	return part{material: m, at: dir}, nil
}

// treeDigest returns the digest of the tree that was made from an object. The cache stores this digest by the object's
// own digest, so that it is computed only once.
func (f *fetcher) treeDigest(ctx context.Context, kind, blob string, compute func() (string, error)) (string, error) {
	key := kind + "\n" + blob
	if known, ok := f.Cache.Fact(digestKind, key); ok {
		if fp, err := target.ParseFingerprint(string(known)); err == nil {
			return string(fp), nil
		}
	}
	digest, err := compute()
	if err != nil {
		return "", err
	}
	return digest, f.Cache.PutFact(digestKind, key, []byte(digest))
}

// pointers are the objects that say where the toolchain is. Newer COS builds have the first of them.
var pointers = []struct {
	name  func(target.Kernel) string
	parse func([]byte) ([]cosbucket.Pointer, error)
}{
	{cosbucket.ToolchainPointerName, one(cosbucket.ParsePointer)},
	{cosbucket.ToolchainPathName, cosbucket.ParseToolchainPath},
	{cosbucket.ToolchainURLName, one(cosbucket.ParseToolchainURL)},
}

func one(parse func([]byte) (cosbucket.Pointer, error)) func([]byte) ([]cosbucket.Pointer, error) {
	return func(text []byte) ([]cosbucket.Pointer, error) {
		p, err := parse(text)
		return []cosbucket.Pointer{p}, err
	}
}

// getter fetches one object with the given fetcher, and returns the resulting file or unpacked tree.
type getter func(ctx context.Context, from *input.Fetcher, name string) (part, error)

// unpackToolchain returns a getter that unpacks the toolchain into the cache.
func unpackToolchain(o archive.Options) getter {
	return func(ctx context.Context, from *input.Fetcher, name string) (part, error) {
		return unpack(ctx, from, name, toolchainKind, o)
	}
}

// getFile fetches an object into the cache without unpacking it.
func getFile(ctx context.Context, from *input.Fetcher, name string) (p part, err error) {
	sum, err := from.ChecksumFile(ctx, name)
	if err != nil {
		return p, err
	}
	if p.material, p.at, err = from.Blob(ctx, name, sum); err != nil {
		return p, err
	}
	return p, from.Recheck(ctx, name, sum, p.material)
}

// toolchain fetches the toolchain from this bucket. If the bucket lacks it, toolchain fetches it from the place that
// one of the pointers names.
func (f *fetcher) toolchain(ctx context.Context, get getter) (p part, err error) {
	none := f.tryLayouts(cosbucket.ToolchainName(f.kernel), func(at string) error {
		p, err = get(ctx, &f.Fetcher, at)
		return err
	})
	if !fault.Is(none, fault.InputMissing) {
		return p, none
	}
	for _, kind := range pointers {
		text, m, err := f.readSmall(ctx, kind.name(f.kernel), cosbucket.MaxPointer)
		if fault.Is(err, fault.InputMissing) {
			continue
		}
		if err != nil {
			return part{}, err
		}
		places, err := kind.parse(text)
		if err != nil {
			return part{}, fmt.Errorf("parse %s: %w", m.URI, err)
		}
		p, err := f.follow(ctx, m, places, get)
		p.pointer = m
		return p, err
	}
	return part{}, none
}

// follow fetches the toolchain from the first of the places that has it. The given pointer is the object that lists the
// places.
func (f *fetcher) follow(ctx context.Context, pointer Material, places []cosbucket.Pointer, get getter) (part,
	error) {
	absent := fmt.Errorf("the toolchain is not at the place that %s names", pointer.URI)
	for _, at := range places {
		f.Progressf("%s: the toolchain is expected at %s", pointer.Name, at)
		p, err := f.getAt(ctx, at, get)
		if !fault.Is(err, fault.InputMissing) {
			return p, err
		}
		absent = fault.Join(absent, err)
	}
	return part{}, fault.Wrap(fault.InputMissing, absent,
		fmt.Sprintf("put the toolchain at %s; or put it at the place that %s names, in a bucket beside "+
			"--kernel-mirror: on the same server, or in the same parent folder",
			f.bucket.URL(cosbucket.ToolchainName(f.kernel)), pointer.Name))
}

// getAt fetches the toolchain from one place in another bucket.
func (f *fetcher) getAt(ctx context.Context, at cosbucket.Pointer, get getter) (_ part, err error) {
	b, err := f.bucket.Sibling(ctx, at)
	if err != nil {
		return part{}, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	other := &input.Fetcher{Source: b, Cache: f.Cache, Progress: func(line string) { f.Progressf("%s", line) }}
	return get(ctx, other, at.Path)
}
