package registry

import (
	"context"
	"encoding/json"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds of [Repository.Attached].
const (
	// MaxAttachments bounds the payloads that are read of those that were asked
	// for, and once more of those that may be.
	MaxAttachments = 64
	// MaxAttachment bounds one of them.
	MaxAttachment = 1 << 20
	// maxLooks bounds the manifests that are read in search of either.
	maxLooks = 1024
	// maxOthers bounds the payloads that are returned although they are of no use.
	maxOthers = 8
)

// Attached returns payloads of this type that are attached to a manifest,
// compared with their digests. Each of wanted is a set of annotations that an
// attachment must have; without any, every attachment is asked for. Those that
// have all of a set come first, a few for each set in turns, so that many of one
// kind hide none of another. Behind them come those that lack an annotation, as
// what was attached without: they may be what is asked for.
//
// At most [MaxAttachments] of either, of at most [MaxAttachment] bytes, are
// read. Longer ones, and manifests of another shape, are left out: anybody who
// may push can attach them.
func (r *Repository) Attached(ctx context.Context, digest, artifactType string, wanted ...map[string]string) ([][]byte, error) {
	return r.attached(ctx, digest, artifactType, nil, wanted)
}

// AttachedIf is [Repository.Attached] for callers who can tell a payload that is of use
// from what anybody may attach: many of the others, whatever their annotations, hide
// none that is, and nor does one whose bytes are not what its name says. A few of the
// others come last, so that the caller can say what was wrong.
func (r *Repository) AttachedIf(ctx context.Context, digest, artifactType string, useful func(payload []byte) bool, wanted ...map[string]string) ([][]byte, error) {
	return r.attached(ctx, digest, artifactType, useful, wanted)
}

func (r *Repository) attached(ctx context.Context, digest, artifactType string, useful func([]byte) bool, wanted []map[string]string) ([][]byte, error) {
	list, err := r.list(ctx, digest)
	if err != nil {
		return nil, err
	}
	asked, perhaps := sortOut(list, wanted)
	all, others, err := r.payloads(ctx, digest, artifactType, asked, useful, wanted)
	if err != nil {
		return nil, err
	}
	more, moreOthers, err := r.payloads(ctx, digest, artifactType, perhaps, useful, wanted)
	if err != nil {
		return nil, err
	}
	others = append(others, moreOthers...)
	return slices.Concat(all, more, others[:min(len(others), maxOthers)]), nil
}

// sortOut returns those that have all annotations of a set, in turns, and those
// that contradict not every set.
func sortOut(list []v1.Descriptor, wanted []map[string]string) (asked, perhaps []v1.Descriptor) {
	if len(wanted) == 0 {
		return list, nil
	}
	queues := make([][]v1.Descriptor, len(wanted))
	longest := 0
	for _, d := range list {
		switch i, may := fit(d.Annotations, wanted); {
		case i >= 0:
			queues[i] = append(queues[i], d)
			longest = max(longest, len(queues[i]))
		case may:
			perhaps = append(perhaps, d)
		}
	}
	for n := range longest {
		for _, q := range queues {
			if n < len(q) {
				asked = append(asked, q[n])
			}
		}
	}
	return asked, perhaps
}

// fit returns the first set that annotations have all of, or -1; may says that
// they contradict not every set.
func fit(annotations map[string]string, wanted []map[string]string) (first int, may bool) {
	for i, set := range wanted {
		all, contradicts := true, false
		for key, value := range set {
			have, ok := annotations[key]
			all = all && have == value
			contradicts = contradicts || ok && have != value
		}
		if all {
			return i, true
		}
		may = may || !contradicts
	}
	return -1, may
}

// payloads reads what is attached by these manifests. One that is listed and is not
// there is left out as one of another shape is. Without useful, all are.
func (r *Repository) payloads(ctx context.Context, digest, artifactType string, list []v1.Descriptor, useful func([]byte) bool, wanted []map[string]string) (all, others [][]byte, err error) {
	looks := 0
	leftOut := func(err error) bool {
		return fault.Is(err, fault.NoArtifact) || useful != nil && fault.Is(err, fault.Unverified)
	}
	for _, d := range list {
		if !mayBe(d, artifactType) {
			continue
		}
		if looks++; looks > maxLooks || len(all) == MaxAttachments {
			break
		}
		raw, err := r.Manifest(ctx, d.Digest.String())
		if leftOut(err) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		var m v1.Manifest
		if err := json.Unmarshal(raw, &m); err != nil || m.ArtifactType != artifactType || len(m.Layers) != 1 ||
			m.Subject == nil || m.Subject.Digest.String() != digest ||
			m.Layers[0].Size < 0 || m.Layers[0].Size > MaxAttachment || checkDigest(m.Layers[0].Digest.String()) != nil {
			continue
		}
		// A list need not repeat the annotations.
		if _, may := fit(m.Annotations, wanted); !may && len(wanted) > 0 {
			continue
		}
		payload, err := r.Small(ctx, m.Layers[0])
		switch {
		case leftOut(err):
		case err != nil:
			return nil, nil, err
		case useful == nil || useful(payload):
			all = append(all, payload)
		case len(others) < maxOthers:
			others = append(others, payload)
		}
	}
	return all, others, nil
}

// mayBe tells whether a descriptor may be of an artifact type: a registry from
// before artifact types reports the config's, or none.
func mayBe(d v1.Descriptor, artifactType string) bool {
	return d.ArtifactType == artifactType || d.ArtifactType == "" || d.ArtifactType == emptyType
}
