// Package snapshot is a signed list of what a farm has published and withdrawn, which a node
// checks without asking the farm: its form, and a client that takes it from any web server
// or folder by the rules of TUF (The Update Framework, 1.0). It refuses lists that are older
// than one it has seen, that have expired, that are put together from several, that do not
// end, and that too few of the trusted keys signed. It refuses to sign, and to decide about an
// artifact.
package snapshot

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/prebake/prebake/pkg/target"
)

// Schema is the version of the list's form. A client refuses any other; within a version
// fields may be added, and clients pass over those that they do not know.
const Schema = 1

// Name is the list's name as a TUF target.
const Name = "catalogue.json.zst"

// Bounds of a list, in bytes: as a file, and unpacked. They allow for several times the
// artifacts of a large farm.
const (
	MaxFile = 64 << 20
	MaxText = 256 << 20
)

// State is what a list says of an artifact.
type State string

// The states.
const (
	Published   State = "published"   // may be used
	Yanked      State = "yanked"      // must not be used any more; Reason says why
	Quarantined State = "quarantined" // did not load on several nodes
)

// Catalogue is the list.
type Catalogue struct {
	Schema int `json:"schema"`
	// MadeAt is when the farm was asked.
	MadeAt time.Time `json:"madeAt"`
	// Artifacts are sorted by digest; each is there once.
	Artifacts []Artifact `json:"artifacts"`
}

// Artifact is one entry.
type Artifact struct {
	Digest string `json:"digest"`
	State  State  `json:"state"`
	// Reason and Replacement are of artifacts that must not be used: why, and the digest of
	// what to use in place of it, where somebody named one.
	Reason      string             `json:"reason,omitempty"`
	Replacement string             `json:"replacement,omitempty"`
	Driver      target.Driver      `json:"driver"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	// Kernels are the COS builds that the artifact is attested for.
	Kernels []Kernel `json:"kernels,omitempty"`
}

// Kernel names a COS build.
type Kernel struct {
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
}

// Decode reads the file. Its bytes are those that somebody signed: [Verify] compares them.
func Decode(file []byte) (*Catalogue, error) {
	c, err := decode(file)
	if err != nil {
		return nil, refused(fmt.Errorf("read catalogue: %w: %w", ErrMalformed, err))
	}
	return c, nil
}

func decode(file []byte) (*Catalogue, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(MaxText), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer dec.Close()
	text, err := dec.DecodeAll(file, nil)
	if err != nil {
		return nil, err
	}
	var c Catalogue
	d := json.NewDecoder(bytes.NewReader(text))
	if err := d.Decode(&c); err != nil {
		return nil, err
	}
	if d.More() {
		return nil, errors.New("more than one document")
	}
	return &c, c.Check()
}

// Check says why no client takes a list.
func (c Catalogue) Check() error {
	if c.Schema != Schema {
		return fmt.Errorf("schema %d; this program knows %d", c.Schema, Schema)
	}
	if c.MadeAt.IsZero() {
		return errors.New("it does not say when it was made")
	}
	for i, a := range c.Artifacts {
		if _, err := target.ParseFingerprint(a.Digest); err != nil { // digests have the same form
			return fmt.Errorf("artifact %d: digest %.80q: want sha256: and 64 lower-case hex digits", i+1, a.Digest)
		}
		if i > 0 && c.Artifacts[i-1].Digest >= a.Digest {
			return fmt.Errorf("artifact %s: twice, or not sorted", a.Digest)
		}
		switch a.State {
		case Published, Yanked, Quarantined:
		default:
			return fmt.Errorf("artifact %s: state %.40q is not known", a.Digest, a.State)
		}
	}
	return nil
}

// Find returns what a list says of a digest; false is nothing.
func (c Catalogue) Find(digest string) (Artifact, bool) {
	i, ok := slices.BinarySearchFunc(
		c.Artifacts,
		digest,
		func(a Artifact, d string) int { return strings.Compare(a.Digest, d) },
	)
	if !ok {
		return Artifact{}, false
	}
	return c.Artifacts[i], true
}
