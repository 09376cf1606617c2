// Package offline packs artifacts with everything that belongs to them into one file for places without a network. The
// file is an OCI image layout in a tar. A bundle is complete, or a delta with only what an earlier bundle lacks.
//
// The package never packs bytes that differ from their digest. A reader of the file must verify the signatures in it.
package offline

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/symbols"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Artifact types and tags of the snapshot and of the public keys in a bundle.
const (
	TypeSnapshot = "application/vnd.prebake.snapshot.v1"
	TypeKeys     = "application/vnd.prebake.keys.v1"
	TagSnapshot  = "snapshot"
	TagKeys      = "keys"
)

// Config says what to pack.
type Config struct {
	// From is the repository with the artifacts.
	From *registry.Repository
	// Kernels, Drivers (versions) and Flavours choose cells; an empty list excludes nothing. With both Kernels and
	// Drivers, each kernel must have each driver in at least one of the flavours.
	Kernels  []target.Kernel
	Drivers  []string
	Flavours []target.Flavour
	// Verifier must accept each artifact for each of its kernels. If nil, nothing is verified.
	Verifier *trust.Verifier
	// Keys are files with public keys. Snapshot is a folder with the signed files of a snapshot, or "" for none.
	Keys     []string
	Snapshot string
	// Images are container images of programs. All platforms are packed.
	Images []Image
	// Since is an earlier bundle, whose blobs are left out. If nil, the new bundle is complete.
	Since *registry.Repository
	// Now is the time for which Verifier checks signatures and certificates.
	Now time.Time
}

// Image is a program's image in a repository.
type Image struct {
	// Name is the image's name in the bundle. Ref is the image's tag or digest in Repo.
	Name, Ref string
	Repo      *registry.Repository
}

// Report says what was packed.
type Report struct {
	// Index is the digest of the packed index.json. Base is the digest of index.json in Config.Since, or "".
	Index string `json:"index"`
	Base  string `json:"base,omitempty"`
	// Artifacts are the packed drivers.
	Artifacts []Artifact `json:"artifacts"`
	Images    []string   `json:"images,omitempty"`
	// Snapshot is the number of files in the snapshot. Keys is the number of public keys.
	Snapshot int `json:"snapshot,omitempty"`
	Keys     int `json:"keys,omitempty"`
	// Size is the file's size in bytes. Blobs and Bytes are the number and the total size of the packed blobs. LeftOut and
	// LeftOutBytes count the blobs that Config.Since has.
	Size         int64 `json:"size"`
	Blobs        int   `json:"blobs"`
	Bytes        int64 `json:"bytes"`
	LeftOut      int   `json:"leftOut,omitempty"`
	LeftOutBytes int64 `json:"leftOutBytes,omitempty"`
}

// Artifact is one driver that was packed.
type Artifact struct {
	Digest  string          `json:"digest"`
	Driver  target.Driver   `json:"driver"`
	Kernels []target.Kernel `json:"kernels"`
	// Size is the total size of the artifact's layers in bytes. Attached is the number of its packed referrers.
	Size     int64 `json:"size"`
	Attached int   `json:"attached"`
}

// Write packs the file. The same input gives the same bytes.
func Write(ctx context.Context, w io.Writer, c Config) (*Report, error) {
	r, err := write(ctx, w, c)
	if err != nil {
		return nil, fmt.Errorf("pack offline bundle: %w", err)
	}
	return r, nil
}

func write(ctx context.Context, w io.Writer, c Config) (*Report, error) {
	p := &packer{blobs: map[string]blob{}, report: Report{Artifacts: []Artifact{}}}
	if c.Since != nil {
		l, ok := c.Since.AsLayout()
		if !ok {
			return nil, fault.New(fault.Usage, c.Since.Name()+" is not a bundle",
				"name the file of an earlier bundle: --since FILE.tar")
		}
		_, index, err := l.Index(ctx)
		if err != nil {
			return nil, err
		}
		p.since, p.report.Base = &l, index
	}
	cells, err := choose(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, cell := range cells {
		if err := p.addDriver(ctx, c, cell); err != nil {
			return nil, err
		}
	}
	for _, img := range c.Images {
		if err := p.addImage(ctx, img); err != nil {
			return nil, err
		}
	}
	if c.Snapshot != "" {
		if p.report.Snapshot, err = p.addFolder(c.Snapshot); err != nil {
			return nil, err
		}
	}
	if len(c.Keys) > 0 {
		if p.report.Keys, err = p.addKeys(c.Keys); err != nil {
			return nil, err
		}
	}
	return &p.report, p.write(ctx, w)
}

// cell is one artifact, with the kernels and tags for which it is packed.
type cell struct {
	digest  string
	kernels []target.Kernel
	tags    []string
}

// choose returns the artifacts that Config selects. It finds them by their tags, which contain kernel and driver.
func choose(ctx context.Context, c Config) ([]cell, error) {
	tags, err := c.From.Tags(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(tags)
	found := map[string]*cell{}
	covered := map[string]bool{}
	for _, tag := range slices.Compact(tags) {
		k, d, ok := parseTag(tag)
		if !ok || !isSelected(c.Kernels, k, target.Kernel.String) || !isSelected(c.Drivers, d.Version, strings.Clone) ||
			!isSelected(c.Flavours, d.Flavour, func(f target.Flavour) string { return string(f) }) {
			continue
		}
		desc, err := c.From.Resolve(ctx, tag)
		if err != nil {
			return nil, err
		}
		digest := desc.Digest.String()
		if found[digest] == nil {
			found[digest] = &cell{digest: digest}
		}
		found[digest].kernels = append(found[digest].kernels, k)
		found[digest].tags = append(found[digest].tags, tag)
		covered[k.String()+" "+d.Version] = true
		covered[k.String()] = true
		covered[d.Version] = true
	}
	if lacks := missingCells(c, covered); len(lacks) > 0 || len(found) == 0 {
		return nil, fault.New(
			fault.NoArtifact,
			c.From.Name()+" has no artifact for "+
				strings.Join(append(lacks, "this selection")[:max(1, len(lacks))], ", "),
			"build the missing artifacts, or select fewer with --kernel, --driver and --flavour",
		)
	}
	cells := make([]cell, 0, len(found))
	for _, one := range found {
		cells = append(cells, *one)
	}
	slices.SortFunc(cells, func(a, b cell) int { return strings.Compare(a.digest, b.digest) })
	return cells, nil
}

// missingCells returns the requested cells, kernels and driver versions without an artifact in the repository.
func missingCells(c Config, covered map[string]bool) (lacks []string) {
	for _, k := range c.Kernels {
		for _, version := range c.Drivers {
			if !covered[k.String()+" "+version] {
				lacks = append(lacks, "driver "+version+" on kernel "+k.String())
			}
		}
		if len(c.Drivers) == 0 && !covered[k.String()] {
			lacks = append(lacks, "kernel "+k.String())
		}
	}
	for _, version := range c.Drivers {
		if len(c.Kernels) == 0 && !covered[version] {
			lacks = append(lacks, "driver "+version+" on any kernel")
		}
	}
	return lacks
}

// isSelected reports whether a list of Config selects a value. An empty list selects every value.
func isSelected[T any](list []T, value T, name func(T) string) bool {
	return len(list) == 0 || slices.ContainsFunc(list, func(x T) bool { return name(x) == name(value) })
}

// kernelTag matches the tags that [bundle.KernelTag] returns.
var kernelTag = regexp.MustCompile(`^cos-([0-9.]+)-([a-z0-9-]+?)-([0-9]+\..+)-(open|proprietary)$`)

func parseTag(tag string) (target.Kernel, target.Driver, bool) {
	m := kernelTag.FindStringSubmatch(tag)
	if m == nil {
		return target.Kernel{}, target.Driver{}, false
	}
	k, err := target.ParseKernel(m[1], m[2])
	if err != nil {
		return k, target.Driver{}, false
	}
	d, err := target.ParseDriver(m[3], m[4])
	return k, d, err == nil && bundle.KernelTag(k, d) == tag
}

// addDriver packs one artifact with its tags and referrers, except debug symbols.
func (p *packer) addDriver(ctx context.Context, c Config, one cell) error {
	content, err := publish.Content(ctx, c.From, one.digest)
	if err != nil {
		return err
	}
	if c.Verifier != nil {
		for _, k := range one.kernels {
			if err := verify(ctx, c, one.digest, content.Identity, k); err != nil {
				return err
			}
		}
	}
	desc, m, err := p.manifest(ctx, c.From, one.digest)
	if err != nil {
		return err
	}
	a := Artifact{Digest: one.digest, Driver: content.Identity.Driver, Kernels: one.kernels}
	for _, l := range m.Layers {
		a.Size += l.Size
	}
	tags := one.tags
	own := bundle.Tag(content.Identity)
	if d, ok, err := publish.Existing(ctx, c.From, own); err != nil {
		return err
	} else if ok && d == one.digest {
		tags = append(tags, own)
	}
	for _, tag := range tags {
		p.addEntry(desc, tag)
	}
	attached, err := c.From.Referrers(ctx, one.digest, "")
	if err != nil {
		return err
	}
	var list []v1.Descriptor
	for _, d := range attached {
		ref, m, err := p.manifestIf(ctx, c.From, d.Digest.String(), func(m *v1.Manifest) bool {
			return m.Subject != nil && m.Subject.Digest == desc.Digest && registry.ArtifactType(m) != symbols.ArtifactType
		})
		if err != nil {
			return err
		}
		if m == nil {
			continue
		}
		ref.ArtifactType, ref.Annotations = registry.ArtifactType(m), registry.EntryAnnotations(m.Annotations)
		list = append(list, ref)
		p.index = append(p.index, ref)
	}
	a.Attached = len(list)
	p.report.Artifacts = append(p.report.Artifacts, a)
	return p.addReferrers(desc, list)
}

// verify returns an error if a node with this kernel would refuse the artifact.
func verify(ctx context.Context, c Config, digest string, id bundle.Identity, k target.Kernel) error {
	statements, err := c.From.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(c.Verifier, digest),
		c.Verifier.Wanted(k)...)
	if err != nil {
		return err
	}
	_, err = c.Verifier.Verify(
		statements,
		trust.Expect{Digest: digest, Kernel: k, Driver: id.Driver, Identity: id, Now: c.Now},
	)
	return err
}

// addReferrers adds a list of a subject's referrers under the tag of OCI's referrers tag schema. Some programs find
// referrers in a layout only by this tag, others by the entries of the index.
func (p *packer) addReferrers(subject v1.Descriptor, list []v1.Descriptor) error {
	if len(list) == 0 {
		return nil
	}
	raw, err := registry.ReferrersList(list)
	if err != nil {
		return err
	}
	d, err := p.addBytes(raw)
	if err != nil {
		return err
	}
	d.MediaType = registry.ReferrersListType
	p.addEntry(d, registry.ReferrersTag(subject.Digest.String()))
	return nil
}

// addImage packs a program's image. An index is packed with the images of all platforms.
func (p *packer) addImage(ctx context.Context, img Image) error {
	d, err := img.Repo.Resolve(ctx, img.Ref)
	if err != nil {
		return err
	}
	if d, err = p.tree(ctx, img.Repo, d.Digest.String(), 2); err != nil {
		return err
	}
	p.addEntry(d, img.Name)
	p.report.Images = append(p.report.Images, img.Name)
	return nil
}

func (p *packer) tree(ctx context.Context, repo *registry.Repository, digest string, depth int) (v1.Descriptor, error) {
	raw, err := repo.Manifest(ctx, digest)
	if err != nil {
		return v1.Descriptor{}, err
	}
	var idx v1.IndexManifest
	if err := json.Unmarshal(raw, &idx); err != nil {
		return v1.Descriptor{}, fault.Errorf(fault.Unverified, "read manifest %s: %w", digest, err)
	}
	if !idx.MediaType.IsIndex() {
		d, _, err := p.manifest(ctx, repo, digest)
		return d, err
	}
	if depth == 0 {
		return v1.Descriptor{}, fault.Errorf(fault.Unverified, "index %s is nested in too many other indexes", digest)
	}
	for _, d := range idx.Manifests {
		if _, ok := p.blobs[d.Digest.Hex]; ok {
			continue
		}
		if _, err := p.tree(ctx, repo, d.Digest.String(), depth-1); err != nil {
			return v1.Descriptor{}, err
		}
	}
	d, err := p.addBytes(raw)
	d.MediaType = idx.MediaType
	return d, err
}

// addKeys packs several files with public keys as one file.
func (p *packer) addKeys(files []string) (int, error) {
	var all bytes.Buffer
	n := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return 0, fault.Wrap(fault.Usage, err, "give --public-key the file FILE.pub that \"builder keygen\" wrote")
		}
		keys, err := trust.ParsePublicKeys(text)
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", file, err)
		}
		n += len(keys)
		all.Write(append(bytes.TrimSpace(text), '\n'))
	}
	d, err := p.addBytes(all.Bytes())
	if err != nil {
		return 0, err
	}
	return n, p.addFiles(
		TypeKeys,
		TagKeys,
		[]v1.Descriptor{registry.FileDescriptor("keys.pem", "application/x-pem-file", d.Digest, d.Size)},
	)
}
