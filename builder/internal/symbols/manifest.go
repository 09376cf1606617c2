package symbols

import (
	"encoding/json"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
)

// ParseManifest returns the only layer of a manifest by [Publish]. Any other manifest is an error.
func ParseManifest(raw []byte) (v1.Descriptor, error) {
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return v1.Descriptor{}, fmt.Errorf("read manifest of debug symbols: %w", err)
	}
	if m.ArtifactType != ArtifactType || len(m.Layers) != 1 || m.Layers[0].MediaType != bundle.MediaTypeLayer ||
		m.Subject == nil {
		return v1.Descriptor{}, fmt.Errorf(
			"read manifest of debug symbols: artifact type %.80q with %d layers; want %s with one layer, and a subject",
			m.ArtifactType, len(m.Layers), ArtifactType)
	}
	return m.Layers[0], nil
}
