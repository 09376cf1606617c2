package registry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// emptyType is the media type of the empty descriptor (image-spec 1.1, "guidance for an empty descriptor").
const emptyType = "application/vnd.oci.empty.v1+json"

var emptyConfig = []byte("{}")

// attachment is a manifest with another manifest as its subject, and with one payload as its layer.
type attachment struct {
	open     func() (io.ReadCloser, error) // opens the payload
	layer    v1.Descriptor
	manifest []byte
	desc     v1.Descriptor
	subject  v1.Hash
	whole    v1.Image // the attachment to copy unchanged; nil if open, layer and manifest describe a new one
}

// inMemory returns the descriptor of a payload in memory, and a function that opens the payload.
func inMemory(mediaType string, payload []byte) (v1.Descriptor, func() (io.ReadCloser, error), error) {
	d := v1.Descriptor{MediaType: types.MediaType(mediaType)}
	var err error
	d.Digest, d.Size, err = v1.SHA256(bytes.NewReader(payload))
	return d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(payload)), nil }, err
}

func newAttachment(subject v1.Descriptor, artifactType string, layer v1.Descriptor, open func() (io.ReadCloser, error),
	annotations map[string]string) (*attachment, error) {
	if artifactType == "" {
		return nil, fault.New(fault.Usage, "the artifact type is missing", "")
	}
	a := &attachment{open: open, layer: layer, subject: subject.Digest}
	var err error
	config := v1.Descriptor{MediaType: emptyType}
	if config.Digest, config.Size, err = v1.SHA256(bytes.NewReader(emptyConfig)); err != nil {
		return nil, err
	}
	a.manifest, err = json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  artifactType,
		Config:        config,
		Layers:        []v1.Descriptor{a.layer},
		Annotations:   annotations,
		Subject:       &v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	})
	if err != nil {
		return nil, err
	}
	a.desc = v1.Descriptor{MediaType: types.OCIManifestSchema1, ArtifactType: artifactType, Annotations: annotations}
	a.desc.Digest, a.desc.Size, err = v1.SHA256(bytes.NewReader(a.manifest))
	return a, err
}

// image returns the attachment as an image, because the library can push only images.
func (a *attachment) image() (v1.Image, error) {
	if a.whole != nil {
		return a.whole, nil
	}
	return partial.CompressedToImage(attachmentImage{a})
}

type attachmentImage struct{ a *attachment }

func (i attachmentImage) RawConfigFile() ([]byte, error)      { return emptyConfig, nil }
func (i attachmentImage) RawManifest() ([]byte, error)        { return i.a.manifest, nil }
func (i attachmentImage) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

func (i attachmentImage) LayerByDigest(h v1.Hash) (partial.CompressedLayer, error) {
	if h != i.a.layer.Digest {
		return nil, fmt.Errorf("the attachment has no layer %s", h)
	}
	return payloadLayer(i), nil
}

type payloadLayer struct{ a *attachment }

func (l payloadLayer) Digest() (v1.Hash, error)            { return l.a.layer.Digest, nil }
func (l payloadLayer) DiffID() (v1.Hash, error)            { return l.a.layer.Digest, nil }
func (l payloadLayer) Size() (int64, error)                { return l.a.layer.Size, nil }
func (l payloadLayer) MediaType() (types.MediaType, error) { return l.a.layer.MediaType, nil }
func (l payloadLayer) Compressed() (io.ReadCloser, error)  { return l.a.open() }
