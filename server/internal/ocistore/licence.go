package ocistore

import (
	"fmt"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
)

// audience is what the registry says of itself to everybody.
func (s *Store) audience() string {
	if s.public {
		return registry.AudiencePublic
	}
	return registry.AudiencePrivate
}

// restricted says why a public registry does not take a manifest; "" means that it does.
func (s *Store) restricted(manifest []byte) string {
	need := bundle.RestrictionOf(manifest)
	if !s.public || s.redistribute.Covers(need) || need == bundle.RedistributeNone {
		return ""
	}
	return fmt.Sprintf(
		"this registry is public, and the artifact holds what is under NVIDIA's licence: publish it to a private one, or, "+
			"if you may pass that on, start the server with --redistribute %s",
		need,
	)
}
