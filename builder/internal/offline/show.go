package offline

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// Listing is the content of a bundle.
type Listing struct {
	// Index is the digest of this bundle's index.json. Base is the digest of index.json in the bundle that a delta needs,
	// or "".
	Index   string  `json:"index"`
	Base    string  `json:"base,omitempty"`
	Entries []Entry `json:"entries"`
	// Attached is the number of manifests that are attached to drivers. Blobs and Bytes are the number and total size
	// of the blobs that were compared with their digests. For a delta, this includes the blobs of its base.
	Attached int   `json:"attached"`
	Blobs    int   `json:"blobs"`
	Bytes    int64 `json:"bytes"`
}

// Entry is one named entry of a bundle.
type Entry struct {
	Names  []string `json:"names"`
	Kind   string   `json:"kind"` // driver, image, snapshot or keys
	Digest string   `json:"digest"`
	Size   int64    `json:"size"` // total size of the layers in bytes, for all platforms
}

// maxDepth is the maximum depth of nested indexes.
const maxDepth = 3

// Show returns the content of a bundle. It compares every blob below the index with its digest.
func Show(ctx context.Context, repo *registry.Repository) (*Listing, error) {
	l, err := show(ctx, repo)
	if err != nil {
		return nil, fmt.Errorf("list the contents of bundle %s: %w", repo.Name(), err)
	}
	return l, nil
}

func show(ctx context.Context, repo *registry.Repository) (*Listing, error) {
	layout, ok := repo.AsLayout()
	if !ok {
		return nil, fault.New(fault.Usage, "this is a registry, not a bundle",
			"name the file of a bundle, or oci:FOLDER for a folder with an image layout")
	}
	idx, digest, err := layout.Index(ctx)
	if err != nil {
		return nil, err
	}
	w := walker{repo: repo, seen: map[string]int64{}, known: map[string]Entry{}}
	l := &Listing{Index: digest, Base: idx.Annotations[registry.AnnotationBase], Entries: []Entry{}}
	places := map[string]int{}
	for _, d := range idx.Manifests {
		size, kind, err := w.manifest(ctx, d, maxDepth)
		if err != nil {
			return nil, err
		}
		name := d.Annotations[registry.AnnotationRefName]
		switch i, ok := places[d.Digest.Hex]; {
		case name == "":
			l.Attached++
		case strings.HasPrefix(name, "sha256-"):
		case ok:
			l.Entries[i].Names = append(l.Entries[i].Names, name)
		default:
			places[d.Digest.Hex] = len(l.Entries)
			l.Entries = append(l.Entries, Entry{Names: []string{name}, Kind: kind, Digest: d.Digest.String(), Size: size})
		}
	}
	slices.SortFunc(l.Entries, func(a, b Entry) int { return strings.Compare(a.Kind+a.Names[0], b.Kind+b.Names[0]) })
	l.Blobs = len(w.seen)
	for _, n := range w.seen {
		l.Bytes += n
	}
	return l, nil
}

// walker walks over the manifests and reads each blob once.
type walker struct {
	repo  *registry.Repository
	seen  map[string]int64
	known map[string]Entry // by the manifest's digest
}

// manifest reads a manifest or an index with everything below it. It returns the size of the layers and the entry's
// kind.
func (w *walker) manifest(ctx context.Context, d v1.Descriptor, depth int) (size int64, kind string, err error) {
	if e, ok := w.known[d.Digest.String()]; ok {
		return e.Size, e.Kind, nil
	}
	if size, kind, err = w.read(ctx, d, depth); err == nil {
		w.known[d.Digest.String()] = Entry{Size: size, Kind: kind}
	}
	return size, kind, err
}

func (w *walker) read(ctx context.Context, d v1.Descriptor, depth int) (size int64, kind string, err error) {
	raw, err := w.repo.Manifest(ctx, d.Digest.String())
	if err != nil {
		return 0, "", err
	}
	if int64(len(raw)) != d.Size {
		return 0, "", fault.Errorf(
			fault.Unverified,
			"manifest %s has %d bytes; the index says that it has %d bytes",
			d.Digest,
			len(raw),
			d.Size,
		)
	}
	w.seen[d.Digest.Hex] = d.Size
	if d.MediaType.IsIndex() {
		var idx v1.IndexManifest
		if err := json.Unmarshal(raw, &idx); err != nil || depth == 0 {
			return 0, "", fault.Errorf(fault.Unverified, "index %s is not valid JSON, or is nested in too many other indexes",
				d.Digest)
		}
		for _, child := range idx.Manifests {
			n, _, err := w.manifest(ctx, child, depth-1)
			if err != nil {
				return 0, "", err
			}
			size += n
		}
		return size, "image", nil
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return 0, "", fault.Errorf(fault.Unverified, "read manifest %s: %w", d.Digest, err)
	}
	for _, l := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if err := w.blob(ctx, l); err != nil {
			return 0, "", err
		}
	}
	for _, l := range m.Layers {
		size += l.Size
	}
	switch {
	case m.ArtifactType == TypeSnapshot:
		return size, TagSnapshot, nil
	case m.ArtifactType == TypeKeys:
		return size, TagKeys, nil
	case m.Annotations[bundle.AnnotationFormat] != "":
		return size, "driver", nil
	}
	return size, "image", nil
}

func (w *walker) blob(ctx context.Context, d v1.Descriptor) error {
	if _, ok := w.seen[d.Digest.Hex]; ok {
		return nil
	}
	if err := registry.Compare(ctx, w.repo, d); err != nil {
		return err
	}
	w.seen[d.Digest.Hex] = d.Size
	return nil
}
