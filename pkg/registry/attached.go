package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds of [Repository.Attached].
const (
	// MaxAttachments is the maximum number of payloads with all wanted annotations, and also the maximum number of
	// payloads that lack some of them.
	MaxAttachments = 64
	// MaxAttachment is the maximum size of one payload in bytes.
	MaxAttachment = 1 << 20
	// maxManifests is the maximum number of manifests that one search reads.
	maxManifests = 1024
	// maxOwn is the maximum number of attachments with all wanted annotations that [Options.Own] puts first. This limit
	// leaves places for attachments of other programs, which may be newer.
	maxOwn = MaxAttachments / 2
	// maxOthers is the maximum number of useless payloads that [Repository.AttachedIf] returns.
	maxOthers = 8
)

// Attached returns the payloads of this type that are attached to a manifest. It compares each payload with its digest.
// Each element of wanted is a set of annotations. An attachment matches if it has all annotations of one set, or if
// there are no sets.
//
// In the result, matching attachments come first: one of each set in turn, the newest of a set first (see
// annotationCreated). So attachments for one set cannot hide those for another. After them come attachments that lack
// an annotation but contradict none, because a registry may list attachments without annotations. In each group, those
// that [Options.Own] names come first, up to a bound.
//
// Attached reads at most [MaxAttachments] payloads of each group. Anybody who may push can attach anything. So Attached
// skips payloads of more than [MaxAttachment] bytes, and manifests that do not have exactly one layer.
//
// If Attached returns an error, it also returns the payloads that it read before. If the repository has listed
// attachments, and then fails to serve one, the error is an [UnreadError].
func (r *Repository) Attached(ctx context.Context, digest, artifactType string, wanted ...map[string]string) ([][]byte,
	error) {
	return r.attached(ctx, digest, artifactType, nil, wanted)
}

// AttachedIf is [Repository.Attached] for a caller that can recognise useful payloads. The callback useful returns a
// name for the content of a useful payload, or "" for a useless payload. Only the first payload of each name is
// returned, so neither useless payloads nor copies hide a useful one. Missing and damaged attachments are skipped. A
// few useless payloads come last, for error messages. If the repository denies an attachment, AttachedIf reads the
// others; see [UnreadError.IsDenied].
func (r *Repository) AttachedIf(ctx context.Context, digest, artifactType string,
	useful func(payload []byte) (what string), wanted ...map[string]string) ([][]byte, error) {
	return r.attached(ctx, digest, artifactType, useful, wanted)
}

func (r *Repository) attached(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted []map[string]string) ([][]byte, error) {
	list, listErr := r.list(ctx, digest, true)
	isCut, isDenied := errors.As(listErr, new(cutError)), false
	if listErr != nil && len(list) == 0 && !isCut {
		return nil, listErr
	}
	s := search{r: r, digest: digest, artifactType: artifactType, useful: useful, wanted: wanted, known: map[string]bool{}}
	complete, incomplete := sortOut(list, wanted)
	complete, incomplete = r.ownFirst(digest, complete, maxOwn), r.ownFirst(digest, incomplete, len(incomplete))
	all, err := s.payloads(ctx, complete) // if a manifest of the list was not read yet, this reads it
	var more [][]byte
	if err != nil {
		s.unread = append(s.unread, incomplete...)
	} else {
		more, err = s.payloads(ctx, incomplete)
	}
	if listErr != nil && s.looks > maxManifests { // the rest of the list is not known to be attached
		isCut = true
	}
	switch {
	case err != nil:
	case isCut:
		err = listErr
	case s.denial != nil:
		isDenied = true
		err = fmt.Errorf("%s denies %d of the attachments that it lists for %s: %w", r.name, len(s.denied), digest, s.denial)
	}
	if err != nil {
		s.unread = slices.DeleteFunc(append(s.denied, s.unread...),
			func(d v1.Descriptor) bool { return !mayBe(d, artifactType) })
		err = &UnreadError{err, s.unread, isCut, isDenied}
	}
	return slices.Concat(all, more, s.others), err
}

// UnreadError is the error of a repository that fails after it has listed attachments.
type UnreadError struct {
	err             error
	list            []v1.Descriptor
	isCut, isDenied bool
}

// Error returns the text of the cause.
func (e *UnreadError) Error() string { return e.err.Error() }

// Unwrap returns the cause.
func (e *UnreadError) Unwrap() error { return e.err }

// Unread returns the attachments that may match, and that were listed but not read.
func (e *UnreadError) Unread() []v1.Descriptor { return e.list }

// IsCut reports whether the list ended in the middle, so that the repository may have more attachments.
func (e *UnreadError) IsCut() bool { return e.isCut }

// IsDenied reports whether the repository listed all attachments, denied those in Unread, and served all others.
func (e *UnreadError) IsDenied() bool { return e.isDenied }

// annotationCreated is the annotation with an attachment's time in RFC 3339 (OCI image-spec, annotations.md). It
// decides the order of attachments, but does not select them.
const annotationCreated = "org.opencontainers.image.created"

// created returns the time of an attachment, or the zero time if the attachment has none.
func created(d v1.Descriptor) time.Time {
	at, _ := time.Parse(time.RFC3339, d.Annotations[annotationCreated]) // zero after an error
	return at
}

// sortOut returns two lists. The first has the attachments with all annotations of a set, one of each set in turn, the
// newest of a set first. The second has the attachments that lack an annotation but do not contradict the set.
func sortOut(list []v1.Descriptor, wanted []map[string]string) (complete, incomplete []v1.Descriptor) {
	if len(wanted) == 0 {
		return list, nil
	}
	queues := make([][]v1.Descriptor, len(wanted))
	longest := 0
	for _, d := range list {
		switch i, possible := matchSet(d.Annotations, wanted); {
		case i >= 0:
			queues[i] = append(queues[i], d)
			longest = max(longest, len(queues[i]))
		case possible:
			incomplete = append(incomplete, d)
		}
	}
	for _, q := range queues {
		sort.SliceStable(q, func(i, j int) bool { return created(q[i]).After(created(q[j])) })
	}
	for n := range longest {
		for _, q := range queues {
			if n < len(q) {
				complete = append(complete, q[n])
			}
		}
	}
	return complete, incomplete
}

// matchSet returns the index of the first set whose elements are all among the annotations, or -1. The second result is
// false if the annotations contradict every set.
func matchSet(annotations map[string]string, wanted []map[string]string) (first int, possible bool) {
	for i, set := range wanted {
		all, contradicts := true, false
		for key, value := range set {
			if key == annotationCreated {
				continue
			}
			have, ok := annotations[key]
			all = all && have == value
			contradicts = contradicts || ok && have != value
		}
		if all {
			return i, true
		}
		possible = possible || !contradicts
	}
	return -1, possible
}

type search struct {
	r                    *Repository
	digest, artifactType string
	useful               func([]byte) string
	wanted               []map[string]string

	known  map[string]bool // names of useful payloads that were found
	others [][]byte        // payloads that are not useful
	unread []v1.Descriptor // attachments that were left when the search failed
	denied []v1.Descriptor // attachments that the repository denied; denial is the first error
	denial error
	looks  int
}

// leftOut reports whether to skip an attachment after this error. A missing attachment is always skipped, a damaged one
// only if the search has the callback useful. A network error or a web page ends the search.
func (s *search) leftOut(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() != nil {
		return false
	}
	return fault.Is(err, fault.NoArtifact) ||
		s.useful != nil && !fault.Is(err, fault.Transient) && !fault.Is(err, fault.WebPage)
}

// payloads returns the useful payloads of these attachments. If it returns an error, it also returns the payloads that
// it read before.
func (s *search) payloads(ctx context.Context, list []v1.Descriptor) (all [][]byte, err error) {
	for i, d := range list {
		if !mayBe(d, s.artifactType) {
			continue
		}
		if s.looks++; s.looks > maxManifests || len(all) == MaxAttachments {
			break
		}
		payload, err := s.payload(ctx, d)
		switch {
		case s.useful != nil && ctx.Err() == nil && Denied(err):
			s.denied, s.denial = append(s.denied, d), cmp.Or(s.denial, err)
			continue
		case s.leftOut(ctx, err), err == nil && payload == nil:
			continue
		case err != nil:
			s.unread = append(s.unread, list[i:]...)
			return all, err
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

// payload returns the payload of one attachment, or nil if the attachment does not match.
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

// layer returns the descriptor of one attachment's payload. It returns nil if the attachment does not match, or if the
// payload has more than maxSize bytes.
func (s *search) layer(ctx context.Context, d v1.Descriptor, maxSize int64) (*v1.Descriptor, error) {
	raw, err := s.r.Manifest(ctx, d.Digest.String())
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || m.ArtifactType != s.artifactType || len(m.Layers) != 1 ||
		m.Subject == nil || m.Subject.Digest.String() != s.digest ||
		m.Layers[0].Size < 0 || m.Layers[0].Size > maxSize || checkDigest(m.Layers[0].Digest.String()) != nil {
		return nil, nil
	}
	// The list of referrers may lack the annotations, so compare the manifest's own.
	if _, possible := matchSet(m.Annotations, s.wanted); !possible && len(s.wanted) > 0 {
		return nil, nil
	}
	layer := m.Layers[0]
	layer.Annotations = m.Annotations
	return &layer, nil
}

// maxPayloads is the maximum number of manifests that [Repository.Payloads] reads.
const maxPayloads = 256

// Payloads is [Repository.Attached] for payloads that are too large to be read whole. It returns the payloads'
// descriptors, the smallest first, with the annotations of their attachments. It skips payloads of more than maxSize
// bytes, and missing or damaged attachments.
func (r *Repository) Payloads(ctx context.Context, digest, artifactType string, maxSize int64,
	wanted ...map[string]string) ([]v1.Descriptor, error) {
	list, err := r.list(ctx, digest, true)
	if err != nil {
		return nil, err
	}
	s := search{r: r, digest: digest, artifactType: artifactType, useful: func([]byte) string { return "" },
		wanted: wanted}
	complete, incomplete := sortOut(list, wanted)
	complete, incomplete = r.ownFirst(digest, complete, maxOwn), r.ownFirst(digest, incomplete, len(incomplete))
	var payloads []v1.Descriptor
	for _, d := range append(complete, incomplete...) {
		if !mayBe(d, artifactType) {
			continue
		}
		if s.looks++; s.looks > maxPayloads {
			break
		}
		layer, err := s.layer(ctx, d, maxSize)
		switch {
		case err != nil && !s.leftOut(ctx, err):
			return nil, err
		case err == nil && layer != nil:
			if i, _ := matchSet(layer.Annotations, wanted); i >= 0 || len(wanted) == 0 {
				payloads = append(payloads, *layer)
			}
		}
	}
	// Not slices.SortStableFunc, which adds 7 KB to each program.
	sort.SliceStable(payloads, func(i, j int) bool { return payloads[i].Size < payloads[j].Size })
	return payloads, nil
}

// mayBe reports whether a listed manifest may have an artifact type. A registry that does not know artifact types lists
// the media type of the config, or no type.
func mayBe(d v1.Descriptor, artifactType string) bool {
	return d.ArtifactType == artifactType || d.ArtifactType == "" || d.ArtifactType == emptyType
}
