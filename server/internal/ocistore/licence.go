package ocistore

import (
	"fmt"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
)

// audience returns the value of a header that tells clients who can read this registry.
func (s *Store) audience() string {
	if s.public {
		return registry.AudiencePublic
	}
	return registry.AudiencePrivate
}

// whyRestricted returns why a public registry refuses a manifest, or "" if the registry accepts it.
func (s *Store) whyRestricted(manifest []byte) string {
	need := bundle.RestrictionOf(manifest)
	if !s.public || s.redistribute.Covers(need) || need == bundle.RedistributeNone {
		return ""
	}
	return fmt.Sprintf(
		"this registry is public, and the artifact has files under NVIDIA's licence: publish it to a private registry, or, "+
			"if you may redistribute these files, start the server with --redistribute %s",
		need,
	)
}
