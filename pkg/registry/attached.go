package registry

import (
	"cmp"
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
	// maxManifests bounds the manifests that are read in search of either.
	maxManifests = 1024
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
func (r *Repository) Attached(ctx context.Context, digest, artifactType string, wanted ...map[string]string) ([][]byte,
	error) {
	return r.attached(ctx, digest, artifactType, nil, wanted)
}

// AttachedIf is [Repository.Attached] for callers who can tell a payload that is of use
// from what anybody may attach. useful names what a payload says, "" is nothing of use: of
// several that say the same one counts. So neither many of the others, nor copies of a good
// one, hide any that is, whatever their annotations; and one that cannot be read as it is
// listed prevents none. A few of the others come last, so that the caller can
// say what was wrong.
func (r *Repository) AttachedIf(ctx context.Context, digest, artifactType string,
	useful func(payload []byte) (what string), wanted ...map[string]string) ([][]byte, error) {
	return r.attached(ctx, digest, artifactType, useful, wanted)
}

func (r *Repository) attached(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted []map[string]string) ([][]byte, error) {
	list, err := r.list(ctx, digest)
	if err != nil {
		return nil, err
	}
	s := search{r: r, digest: digest, artifactType: artifactType, useful: useful, wanted: wanted, known: map[string]bool{}}
	asked, perhaps := sortOut(list, wanted)
	all, err := s.payloads(ctx, asked)
	if err != nil {
		return nil, err
	}
	more, err := s.payloads(ctx, perhaps)
	if err != nil {
		return nil, err
	}
	return slices.Concat(all, more, s.others), nil
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
		switch i, may := matchSet(d.Annotations, wanted); {
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

// matchSet returns the first set that annotations have all of, or -1; may says that
// they contradict not every set.
func matchSet(annotations map[string]string, wanted []map[string]string) (first int, may bool) {
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

// search is one look for payloads.
type search struct {
	r                    *Repository
	digest, artifactType string
	useful               func([]byte) string
	wanted               []map[string]string

	known  map[string]bool // what useful ones said
	others [][]byte        // of no use
	looks  int
}

// leftOut reports whether an attachment is passed over: one that is listed and is not
// there always, and where others are of use also one that is not what it should be. A
// network that fails is no property of an attachment.
func (s *search) leftOut(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() != nil {
		return false
	}
	return fault.Is(err, fault.NoArtifact) || s.useful != nil && !fault.Is(err, fault.Transient)
}

// payloads reads what is attached by these manifests.
func (s *search) payloads(ctx context.Context, list []v1.Descriptor) (all [][]byte, err error) {
	for _, d := range list {
		if !mayBe(d, s.artifactType) {
			continue
		}
		if s.looks++; s.looks > maxManifests || len(all) == MaxAttachments {
			break
		}
		payload, err := s.payload(ctx, d)
		switch {
		case s.leftOut(ctx, err), err == nil && payload == nil:
			continue
		case err != nil:
			return nil, err
		case s.useful == nil:
			all = append(all, payload)
			continue
		}
		switch what := s.useful(payload); {
		case what == "" && len(s.others) < maxOthers:
			s.others = append(s.others, payload)
		case what != "" && !s.known[what]:
			s.known[what] = true
			all = append(all, payload)
		}
	}
	return all, nil
}

// payload reads one; nil is a manifest of another shape.
func (s *search) payload(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	layer, err := s.layer(ctx, d, MaxAttachment)
	if err != nil || layer == nil {
		return nil, err
	}
	payload, err := s.r.Small(ctx, *layer)
	if err == nil && payload == nil {
		payload = []byte{}
	}
	return payload, err
}

// layer tells what the payload of one is; nil is a manifest of another shape.
func (s *search) layer(ctx context.Context, d v1.Descriptor, most int64) (*v1.Descriptor, error) {
	raw, err := s.r.Manifest(ctx, d.Digest.String())
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || m.ArtifactType != s.artifactType || len(m.Layers) != 1 ||
		m.Subject == nil || m.Subject.Digest.String() != s.digest ||
		m.Layers[0].Size < 0 || m.Layers[0].Size > most || checkDigest(m.Layers[0].Digest.String()) != nil {
		return nil, nil
	}
	// A list need not repeat the annotations.
	if _, may := matchSet(m.Annotations, s.wanted); !may && len(s.wanted) > 0 {
		return nil, nil
	}
	layer := m.Layers[0]
	layer.Annotations = m.Annotations
	return &layer, nil
}

// maxPayloads bounds what [Repository.Payloads] examines.
const maxPayloads = 256

// Payloads is [Repository.Attached] for payloads that are too large to be read whole: it
// returns the descriptor of each that has no more than so many bytes, with the annotations
// of its attachment, the smallest first. Those that cannot be read are left out.
func (r *Repository) Payloads(ctx context.Context, digest, artifactType string, most int64,
	wanted ...map[string]string) ([]v1.Descriptor, error) {
	list, err := r.list(ctx, digest)
	if err != nil {
		return nil, err
	}
	s := search{r: r, digest: digest, artifactType: artifactType, useful: func([]byte) string { return "" },
		wanted: wanted}
	asked, perhaps := sortOut(list, wanted)
	var payloads []v1.Descriptor
	for _, d := range append(asked, perhaps...) {
		if !mayBe(d, artifactType) {
			continue
		}
		if s.looks++; s.looks > maxPayloads {
			break
		}
		layer, err := s.layer(ctx, d, most)
		switch {
		case err != nil && !s.leftOut(ctx, err):
			return nil, err
		case err == nil && layer != nil:
			if i, _ := matchSet(layer.Annotations, wanted); i >= 0 || len(wanted) == 0 {
				payloads = append(payloads, *layer)
			}
		}
	}
	slices.SortStableFunc(payloads, func(a, b v1.Descriptor) int { return cmp.Compare(a.Size, b.Size) })
	return payloads, nil
}

// mayBe tells whether a descriptor may be of an artifact type: a registry from
// before artifact types reports the config's, or none.
func mayBe(d v1.Descriptor, artifactType string) bool {
	return d.ArtifactType == artifactType || d.ArtifactType == "" || d.ArtifactType == emptyType
}
