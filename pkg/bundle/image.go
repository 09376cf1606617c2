package bundle

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Image returns the artifact as an OCI image with an image config, three layers and the identity as annotations. The
// result depends only on the arguments.
func Image(id Identity, layers []Layer) (v1.Image, error) {
	if err := id.validate(); err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	if len(layers) != len(LayerKinds()) {
		return nil, fmt.Errorf("make image: %d layers are given; want %d layers", len(layers), len(LayerKinds()))
	}
	img := &image{layers: slices.Clone(layers)}
	config := v1.ConfigFile{
		Architecture: string(id.Arch),
		OS:           "linux",
		Created:      epoch(),
		RootFS:       v1.RootFS{Type: "layers"},
	}
	manifest := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Annotations:   id.Annotations(),
	}
	maps.Copy(manifest.Annotations, LicenceOf(id.Driver.Flavour).annotations())
	for i, l := range layers {
		if l.Kind != LayerKinds()[i] {
			return nil, fmt.Errorf("make image: layer %d is of kind %q; want %q", i, l.Kind, LayerKinds()[i])
		}
		digest, err := v1.NewHash(l.Digest)
		if err != nil {
			return nil, fmt.Errorf("make image: %w", err)
		}
		diffID, err := v1.NewHash(l.DiffID)
		if err != nil {
			return nil, fmt.Errorf("make image: %w", err)
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
		config.History = append(config.History, v1.History{Created: epoch(), CreatedBy: "prebake " + string(l.Kind)})
		manifest.Layers = append(manifest.Layers, v1.Descriptor{
			MediaType:   MediaTypeLayer,
			Digest:      digest,
			Size:        l.Size,
			Annotations: map[string]string{AnnotationLayer: string(l.Kind), annotationTitle: l.Kind.title()},
		})
	}
	var err error
	if img.config, err = json.Marshal(config); err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	manifest.Config.MediaType = types.OCIConfigJSON
	if manifest.Config.Digest, manifest.Config.Size, err = v1.SHA256(bytes.NewReader(img.config)); err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	if img.manifest, err = json.Marshal(manifest); err != nil {
		return nil, fmt.Errorf("make image: %w", err)
	}
	return partial.CompressedToImage(img)
}

// epoch returns the time that an artifact has in place of the time of its build: 1970-01-01.
func epoch() v1.Time { return v1.Time{Time: time.Unix(0, 0).UTC()} }

// image has the methods from which package partial makes a v1.Image.
type image struct {
	config, manifest []byte
	layers           []Layer
}

func (i *image) RawConfigFile() ([]byte, error)      { return i.config, nil }
func (i *image) RawManifest() ([]byte, error)        { return i.manifest, nil }
func (i *image) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (i *image) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	for _, l := range i.layers {
		if l.Digest == h.String() {
			return fileLayer{l}, nil
		}
	}
	return nil, fmt.Errorf("the image has no layer %s", h)
}

// fileLayer is a layer whose compressed bytes are in a file.
type fileLayer struct{ layer Layer }

func (l fileLayer) Digest() (v1.Hash, error)            { return v1.NewHash(l.layer.Digest) }
func (l fileLayer) DiffID() (v1.Hash, error)            { return v1.NewHash(l.layer.DiffID) }
func (l fileLayer) Size() (int64, error)                { return l.layer.Size, nil }
func (l fileLayer) MediaType() (types.MediaType, error) { return MediaTypeLayer, nil }
func (l fileLayer) Compressed() (io.ReadCloser, error)  { return os.Open(l.layer.Path) }
