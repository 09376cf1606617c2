// Package nvsrc fetches one NVIDIA release into the cache. It checks the runfile against its SHA-256 and unpacks it
// without running any part of it. The Stage functions copy the unpacked files into the folders of an installation.
//
// The package refuses a runfile without a published SHA-256, and a runfile with another version than in its name. It
// refuses a flavour that the release does not have.
package nvsrc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/builder/internal/runfile"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Material is one input of a build, as the provenance lists it.
type Material = input.Material

// Release is one NVIDIA release in the cache. Nobody may write below Dir.
type Release struct {
	Version string
	// Flavours are the flavours for which the release has module sources.
	Flavours  []target.Flavour
	Materials []Material
	// Dir is the folder of the unpacked runfile.
	Dir string
	// Digest is the runfile's SHA-256. Digest and StageRecipe decide what the Stage functions write.
	Digest string
	// SourceDigest is a digest of the content of all module sources, of all flavours.
	SourceDigest string
	// Manifest describes the release's files. It is nil if it is missing or cannot be parsed.
	Manifest *runfile.Manifest
}

// Kinds of cached trees and facts. Raise a number when this package makes another tree or fact from the same runfile.
const (
	driverKind = "driver-v1"
	sourceKind = "driver-source-v1"
)

// limits are several times the size of a release of 2026 (1.5 GB, 2,500 files).
var limits = archive.Options{Entries: 100_000, Bytes: 8 << 30}

// folders has the folder of the module sources in a release, by flavour.
var folders = map[target.Flavour]string{target.Proprietary: "kernel", target.Open: "kernel-open"}

// lister is a bucket that can list its objects, unlike a plain https bucket.
type lister interface {
	List(ctx context.Context, prefix string) ([]string, error)
}

// Fetch fetches a release into the cache. It calls say with its progress, one line at a time; say may be nil.
func Fetch(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, version string, arch target.Arch,
	say func(string)) (*Release, error) {
	return fetch(ctx, b, cache, version, arch, say)
}

func fetch(ctx context.Context, b input.Source, cache *cas.Cache, version string, arch target.Arch,
	say func(string)) (*Release, error) {
	if !target.ValidVersion(version) {
		return nil, fault.New(fault.Usage, fmt.Sprintf("driver version %q: want numbers with dots", version),
			"name a version such as 535.261.03, or 535.261.03-grid")
	}
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, version: version, arch: arch}
	r, err := f.run(ctx)
	if err != nil {
		return nil, fmt.Errorf("fetch driver %s: %w", version, err)
	}
	return r, nil
}

type fetcher struct {
	input.Fetcher
	version string
	arch    target.Arch
}

func (f *fetcher) run(ctx context.Context) (*Release, error) {
	name, sum, err := f.find(ctx)
	if err != nil {
		return nil, f.withHint(ctx, err)
	}
	m, file, err := f.Blob(ctx, name, sum)
	if err != nil {
		return nil, f.withHint(ctx, err)
	}
	dir, cached, err := f.Cache.Tree(ctx, driverKind, m.Digest, func(ctx context.Context, dir string) error {
		if err := f.Recheck(ctx, name, sum, m); err != nil {
			return err
		}
		return extract(ctx, file, dir)
	})
	if err != nil {
		return nil, fmt.Errorf("extract %s: %w", m.Name, err)
	}
	if !cached {
		f.Progressf("%s: extracted", m.Name)
	}
	r := &Release{Version: f.version, Dir: dir, Digest: m.Digest, Materials: []Material{m}}
	if r.Manifest, err = f.manifest(dir); err != nil {
		return nil, err
	}
	for _, flavour := range []target.Flavour{target.Proprietary, target.Open} {
		if isSource(filepath.Join(dir, folders[flavour])) {
			r.Flavours = append(r.Flavours, flavour)
		}
	}
	if len(r.Flavours) == 0 {
		return nil, fault.New(fault.Unsupported, fmt.Sprintf("%s has no kernel module sources", m.Name),
			"check that the object is NVIDIA's full driver runfile")
	}
	if r.SourceDigest, err = f.sourceDigest(ctx, dir, m.Digest); err != nil {
		return nil, err
	}
	return r, nil
}

// find returns the name of the runfile and its SHA-256, at the first location with a SHA-256 of the release.
func (f *fetcher) find(ctx context.Context) (name string, sum input.Sum, err error) {
	var none error
	for _, place := range cosbucket.RunfileLocations(f.version, f.arch) {
		sum, err = f.Sum(ctx, input.SHA256, place.Sum, place.Runfile)
		if !fault.Is(err, fault.InputMissing) {
			return place.Runfile, sum, err
		}
		if none == nil {
			none = err // if no location has the release, the error is about the first location, which is COS's own
		}
	}
	return "", input.Sum{}, none
}

// withHint adds a hint to the error for a missing runfile: some versions that the bucket has. If no version is known,
// for example because the bucket cannot be listed, the hint says where to copy the runfile.
func (f *fetcher) withHint(ctx context.Context, err error) error {
	if !fault.Is(err, fault.InputMissing) {
		return err
	}
	name := cosbucket.RunfileName(f.version, f.arch)
	hint := "check the version, or copy the runfile and its sha256 to " + f.Source.URL(name) + " and " +
		f.Source.URL(cosbucket.RunfileSumName(f.version, f.arch))
	if l, ok := f.Source.(lister); ok {
		prefix, _, _ := strings.Cut(name, f.version)
		var names []string
		for _, at := range []string{prefix, "tesla/"} {
			if found, lerr := l.List(ctx, at); lerr == nil {
				names = append(names, found...)
			}
		}
		if near := f.nearestVersions(names); len(near) > 0 {
			hint = "choose a version that the bucket has, such as " + strings.Join(near, ", ")
		}
	}
	return fault.Wrap(fault.InputMissing, fmt.Errorf("the driver bucket has no runfile of this release: %w", err), hint)
}

// nearestVersions returns up to six versions of a listing, those of the same branch first.
func (f *fetcher) nearestVersions(names []string) []string {
	var same, other []string
	for _, n := range names {
		v, arch, ok := cosbucket.ParseRunfile(n)
		switch {
		case !ok || arch != f.arch || v == f.version:
		case target.Branch(v) == target.Branch(f.version):
			same = append(same, v)
		default:
			other = append(other, v)
		}
	}
	newest := func(a, b string) int { return target.CompareVersions(b, a) }
	slices.SortFunc(same, newest)
	slices.SortFunc(other, newest)
	all := slices.Compact(append(same, other...))
	return all[:min(6, len(all))]
}

func extract(ctx context.Context, file, dir string) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	payload, _, err := runfile.Payload(in)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	o := limits
	if tool, err := exec.LookPath("xz"); err == nil {
		o.XZTool = tool // xz is about three times as fast as the decoder in Go; Unpack limits what xz may write in total
	}
	_, err = archive.Unpack(ctx, payload, root, o)
	return err
}

// manifest reads .manifest. It returns nil if the file is missing or cannot be parsed. Then the files' names and
// SONAMEs decide where the files go. A manifest of another driver version is an error.
func (f *fetcher) manifest(dir string) (*runfile.Manifest, error) {
	in, err := os.OpenInRoot(dir, ".manifest")
	if errors.Is(err, fs.ErrNotExist) {
		f.Progressf("the release has no .manifest: libraries are recognised by their SONAME")
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read .manifest: %w", err)
	}
	defer in.Close()
	m, err := runfile.ParseManifest(in)
	if err != nil {
		if !fault.Is(err, fault.Unverified) {
			return nil, err
		}
		f.Progressf("%v: libraries are recognised by their SONAME", err)
		return nil, nil
	}
	if target.ModuleVersion(m.Version) != target.ModuleVersion(f.version) {
		return nil, fault.New(fault.Mismatch, fmt.Sprintf("the runfile has version %.60q; want version %s", m.Version,
			f.version),
			"put the runfile of driver "+f.version+" at "+
				f.Source.URL(cosbucket.RunfileName(f.version, f.arch)))
	}
	if len(m.Unknown) > 0 {
		f.Progressf("left out the files of these types in .manifest, which are unknown: %s",
			strings.Join(slices.Sorted(maps.Keys(m.Unknown)), ", "))
	}
	return m, nil
}

func (f *fetcher) sourceDigest(ctx context.Context, dir, blob string) (string, error) {
	if known, ok := f.Cache.Fact(sourceKind, blob); ok {
		if fp, err := target.ParseFingerprint(string(known)); err == nil {
			return string(fp), nil
		}
	}
	digest, err := cas.DigestTree(ctx, dir, func(name string) bool {
		top, _, _ := strings.Cut(name, "/")
		return top != folders[target.Proprietary] && top != folders[target.Open]
	})
	if err != nil {
		return "", err
	}
	return digest, f.Cache.PutFact(sourceKind, blob, []byte(digest))
}

// isSource reports whether dir is a folder with NVIDIA's kbuild files.
func isSource(dir string) bool {
	fi, err := os.Lstat(dir)
	if err != nil || !fi.IsDir() {
		return false
	}
	for _, must := range []string{"Makefile", "Kbuild"} {
		if fi, err := os.Lstat(filepath.Join(dir, must)); err != nil || !fi.Mode().IsRegular() {
			return false
		}
	}
	return true
}

// Source returns the folder with the module sources of a flavour.
func (r *Release) Source(f target.Flavour) (dir string, err error) {
	if slices.Contains(r.Flavours, f) {
		return filepath.Join(r.Dir, folders[f]), nil
	}
	names := make([]string, len(r.Flavours))
	for i, have := range r.Flavours {
		names[i] = string(have)
	}
	return "", fault.New(fault.Unsupported, fmt.Sprintf("driver %s has no modules of flavour %s", r.Version, f),
		"use --flavour "+strings.Join(names, " or "))
}
