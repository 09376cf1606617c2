package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// MaxManifest is the maximum size in bytes of a manifest or a config. Prebake's own have about 2 KB.
const MaxManifest = 1 << 20

// ContentLayer describes one layer of a published artifact.
type ContentLayer struct {
	Kind           LayerKind
	Digest, DiffID string
	// Size is the number of compressed bytes.
	Size int64
}

// Content is what [ParseManifest] reads from an artifact's manifest and config.
type Content struct {
	Identity Identity
	// Layers are in manifest order: modules, user space, firmware.
	Layers []ContentLayer
	// Config is the digest of the config.
	Config string
}

// Layer returns the layer of this kind, or the zero value if there is none.
func (c Content) Layer(kind LayerKind) ContentLayer {
	for _, l := range c.Layers {
		if l.Kind == kind {
			return l
		}
	}
	return ContentLayer{}
}

// ConfigDescriptor returns the descriptor of a manifest's config, by which a caller can download the config.
func ConfigDescriptor(manifest []byte) (v1.Descriptor, error) {
	m, err := decodeManifest(manifest)
	if err != nil {
		return v1.Descriptor{}, fault.Errorf(fault.Unverified, "read artifact manifest: %w", err)
	}
	return m.Config, nil
}

// DriverOf returns the driver in a manifest's annotations. It does not need the config.
func DriverOf(manifest []byte) (target.Driver, error) {
	m, err := decodeManifest(manifest)
	if err != nil {
		return target.Driver{}, fault.Errorf(fault.Unverified, "read artifact manifest: %w", err)
	}
	id, err := parseIdentity(m.Annotations)
	if err != nil {
		return target.Driver{}, fault.Errorf(fault.Unverified, "read artifact manifest: %w", err)
	}
	return id.Driver, nil
}

// ParseManifest parses and checks an artifact's manifest and config. It refuses unknown fields, and layers whose
// number, order, kind or media type is not that of [Image]. It ignores unknown annotations. The caller must have
// compared the manifest's bytes with the manifest's digest.
func ParseManifest(manifest, config []byte) (Content, error) {
	c, err := parseManifest(manifest, config)
	if err != nil {
		return Content{}, fault.Errorf(fault.Unverified, "read artifact manifest: %w", err)
	}
	return c, nil
}

func parseManifest(manifest, config []byte) (Content, error) {
	m, err := decodeManifest(manifest)
	if err != nil {
		return Content{}, err
	}
	id, err := parseIdentity(m.Annotations)
	if err != nil {
		return Content{}, err
	}
	if err := checkLicence(m, id.Driver.Flavour); err != nil {
		return Content{}, err
	}
	digest, size, err := v1.SHA256(bytes.NewReader(config))
	if err != nil {
		return Content{}, err
	}
	if digest != m.Config.Digest || size != m.Config.Size {
		return Content{}, fmt.Errorf("the image config has digest %s; the manifest says %s", digest, m.Config.Digest)
	}
	var cf v1.ConfigFile
	if err := decode(config, &cf); err != nil {
		return Content{}, fmt.Errorf("parse the image config: %w", err)
	}
	if cf.OS != "linux" || cf.Architecture != string(id.Arch) {
		return Content{}, fmt.Errorf("the image config is for %.20q/%.20q; the annotations say linux/%s", cf.OS,
			cf.Architecture,
			id.Arch)
	}
	if cf.RootFS.Type != "layers" || len(cf.RootFS.DiffIDs) != len(m.Layers) {
		return Content{}, fmt.Errorf("the image config has %d diff IDs; want %d, one for each layer",
			len(cf.RootFS.DiffIDs), len(m.Layers))
	}
	content := Content{Identity: id, Config: digest.String()}
	for i, l := range m.Layers {
		diffID := cf.RootFS.DiffIDs[i]
		if err := checkHash(diffID); err != nil {
			return Content{}, err
		}
		content.Layers = append(content.Layers,
			ContentLayer{Kind: LayerKinds()[i], Digest: l.Digest.String(), DiffID: diffID.String(), Size: l.Size})
	}
	return content, nil
}

// decodeManifest parses a manifest and checks its config descriptor and its layers, but not its own annotations.
func decodeManifest(manifest []byte) (*v1.Manifest, error) {
	var m v1.Manifest
	if err := decode(manifest, &m); err != nil {
		return nil, err
	}
	switch {
	case m.SchemaVersion != 2 || m.MediaType != types.OCIManifestSchema1:
		return nil, fmt.Errorf("the manifest has schema version %d and media type %.80q; want an OCI image manifest",
			m.SchemaVersion, m.MediaType)
	case m.Subject != nil || m.ArtifactType != "":
		return nil, errors.New("the manifest has a subject or an artifact type; want neither of them")
	case m.Config.MediaType != types.OCIConfigJSON:
		return nil, fmt.Errorf("the image config has media type %.80q; want %s", m.Config.MediaType, types.OCIConfigJSON)
	case m.Config.Size <= 0 || m.Config.Size > MaxManifest:
		return nil, fmt.Errorf("the image config has %d bytes; want 1 to %d bytes", m.Config.Size, MaxManifest)
	case len(m.Layers) != len(LayerKinds()):
		return nil, fmt.Errorf("the manifest has %d layers; want %d layers", len(m.Layers), len(LayerKinds()))
	}
	if err := checkHash(m.Config.Digest); err != nil {
		return nil, err
	}
	for i, l := range m.Layers {
		kind := LayerKinds()[i]
		switch {
		case l.MediaType != MediaTypeLayer:
			return nil, fmt.Errorf("layer %d has media type %.80q; want %s", i, l.MediaType, MediaTypeLayer)
		case l.Annotations[AnnotationLayer] != string(kind):
			return nil, fmt.Errorf("layer %d is of kind %.40q; want %q", i, l.Annotations[AnnotationLayer], kind)
		case l.Size <= 0 || l.Size > maxBytes:
			return nil, fmt.Errorf("the %s layer has %d bytes; want 1 to %d bytes", kind, l.Size, int64(maxBytes))
		case len(l.URLs) > 0 || len(l.Data) > 0:
			return nil, fmt.Errorf("the %s layer has the field urls or data; want neither of them", kind)
		}
		if err := checkHash(l.Digest); err != nil {
			return nil, err
		}
	}
	return &m, nil
}

func checkHash(h v1.Hash) error {
	if h.Algorithm != "sha256" || len(h.Hex) != 64 {
		return fmt.Errorf("digest %.80q: want sha256: and 64 hex digits", h)
	}
	return nil
}

// decode parses data, which must be exactly one JSON value without unknown fields.
func decode(data []byte, v any) error {
	if len(data) > MaxManifest {
		return fmt.Errorf("the JSON document has %d bytes; want at most %d bytes", len(data), MaxManifest)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is data after the end of the JSON document")
	}
	return nil
}
