package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// maxImage is the maximum size in bytes of all layers of a pulled image together.
const maxImage = 4 << 30

// PullImage downloads an image into an empty folder. If digest is that of an index, PullImage downloads the index's
// image for the given architecture. It compares each file with its digest. The returned image reads its layers from the
// folder.
func (r *Repository) PullImage(ctx context.Context, digest, arch, dir string) (v1.Image, error) {
	img, err := r.pullImage(ctx, digest, arch, dir)
	if err != nil {
		return nil, fmt.Errorf("pull image %s from %s: %w", digest, r.name, err)
	}
	return img, nil
}

func (r *Repository) pullImage(ctx context.Context, digest, arch, dir string) (v1.Image, error) {
	raw, err := r.Manifest(ctx, digest)
	if err != nil {
		return nil, err
	}
	if raw, err = r.ofArch(ctx, raw, arch); err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || !m.MediaType.IsImage() || len(m.Layers) == 0 {
		return nil, fault.Errorf(fault.Unverified, "this is not the manifest of an image, but has media type %.100q",
			m.MediaType)
	}
	p := pulled{manifest: raw, mediaType: m.MediaType, dir: dir, layers: m.Layers}
	if p.config, err = r.Small(ctx, m.Config); err != nil {
		return nil, err
	}
	var total int64
	saved := map[v1.Hash]bool{} // an image may have a layer twice
	for _, l := range m.Layers {
		if total += l.Size; l.Size < 0 || total > maxImage {
			return nil, fault.Errorf(fault.Unverified, "the layers have more than %d bytes in all", int64(maxImage))
		}
		if saved[l.Digest] {
			continue
		}
		saved[l.Digest] = true
		if err := r.saveBlob(ctx, l, p.path(l.Digest)); err != nil {
			return nil, err
		}
	}
	return partial.CompressedToImage(p)
}

// If raw is an index, ofArch returns the index's manifest for an architecture. If raw is not an index, ofArch returns
// raw.
func (r *Repository) ofArch(ctx context.Context, raw []byte, arch string) ([]byte, error) {
	var idx v1.IndexManifest
	if err := json.Unmarshal(raw, &idx); err != nil || !idx.MediaType.IsIndex() {
		return raw, nil
	}
	for _, d := range idx.Manifests {
		if d.MediaType.IsImage() && d.Platform != nil && d.Platform.OS == "linux" && d.Platform.Architecture == arch {
			return r.Manifest(ctx, d.Digest.String())
		}
	}
	return nil, fault.New(fault.Mismatch, "the index has no image for linux/"+arch, "use an image for this architecture")
}

// saveBlob writes a blob into a file. It replaces the file of an earlier pull.
func (r *Repository) saveBlob(ctx context.Context, d v1.Descriptor, file string) (err error) {
	rc, err := r.Blob(ctx, d.Digest.String(), d.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(f, h), rc)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fault.Disk(fmt.Errorf("read blob %s: %w", d.Digest, err), "free space on the disk of the folder for the image")
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != d.Digest.Hex {
		return fmt.Errorf("read blob %s: %w", d.Digest, damaged(fmt.Errorf("the content has digest sha256:%s", got)))
	}
	return nil
}

// Compare compares a blob with its digest and size. If digest or size differ, the error is of kind Unverified.
func Compare(ctx context.Context, r *Repository, d v1.Descriptor) error {
	rc, err := r.Blob(ctx, d.Digest.String(), d.Size)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(h, rc)
	if err = errors.Join(err, rc.Close()); err != nil {
		return fmt.Errorf("read blob %s: %w", d.Digest, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != d.Digest.Hex || n != d.Size {
		return fault.New(
			fault.Unverified,
			fmt.Sprintf("read blob %s: the content has %d bytes and digest sha256:%s; want %d bytes", d.Digest, n, got, d.Size),
			"get the file again from its publisher",
		)
	}
	return nil
}

// pulled has the methods from which package partial makes a v1.Image.
type pulled struct {
	manifest, config []byte
	mediaType        types.MediaType
	dir              string
	layers           []v1.Descriptor
}

func (p pulled) path(h v1.Hash) string               { return filepath.Join(p.dir, h.Hex) }
func (p pulled) RawConfigFile() ([]byte, error)      { return p.config, nil }
func (p pulled) RawManifest() ([]byte, error)        { return p.manifest, nil }
func (p pulled) MediaType() (types.MediaType, error) { return p.mediaType, nil }
func (p pulled) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range p.layers {
		if l.Digest == h {
			return pulledLayer{l, p.path(h)}, nil
		}
	}
	return nil, fmt.Errorf("the image has no layer %s", h)
}

type pulledLayer struct {
	d    v1.Descriptor
	file string
}

func (l pulledLayer) Digest() (v1.Hash, error)            { return l.d.Digest, nil }
func (l pulledLayer) Size() (int64, error)                { return l.d.Size, nil }
func (l pulledLayer) MediaType() (types.MediaType, error) { return l.d.MediaType, nil }
func (l pulledLayer) Compressed() (io.ReadCloser, error)  { return os.Open(l.file) }
