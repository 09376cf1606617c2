// Package snapshot handles snapshots: signed lists of the artifacts that a farm has published and withdrawn. It defines
// the format of the list, and a client that reads the list from any web server or folder. The client follows TUF (The
// Update Framework, 1.0), and needs no connection to the farm.
//
// The client refuses a list in each of these cases:
//   - It is older than a list that the client has seen.
//   - It has expired.
//   - It mixes parts of several lists.
//   - It is longer than its signed size.
//   - Too few of the trusted keys signed it.
//
// The package does not sign, and does not decide whether a node may use an artifact.
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

// Schema is the version of the list's format. A client refuses any other version. New fields need no new version,
// because clients ignore unknown fields.
const Schema = 1

// Name is the TUF target name of the list.
const Name = "catalogue.json.zst"

// The maximum sizes of a list in bytes, compressed and decompressed: several times those of a large farm.
const (
	MaxFile = 64 << 20
	MaxText = 256 << 20
)

// State is the state of an artifact in a list.
type State string

// The states of an artifact.
const (
	Published   State = "published"   // nodes may use it
	Yanked      State = "yanked"      // nodes must not use it any more; Reason says why
	Quarantined State = "quarantined" // it did not load on several nodes
)

// Catalogue is the content of the list.
type Catalogue struct {
	Schema int `json:"schema"`
	// MadeAt is the time at which the artifacts were requested from the farm.
	MadeAt time.Time `json:"madeAt"`
	// Artifacts are sorted by digest, and no digest is repeated.
	Artifacts []Artifact `json:"artifacts"`
}

// Artifact is one entry of the list.
type Artifact struct {
	Digest string `json:"digest"`
	State  State  `json:"state"`
	// Reason says why a withdrawn artifact must not be used. Replacement is the digest of the artifact to use instead; it
	// may be "".
	Reason      string             `json:"reason,omitempty"`
	Replacement string             `json:"replacement,omitempty"`
	Driver      target.Driver      `json:"driver"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	// Kernels are the COS builds that have a kernel-match attestation for the artifact.
	Kernels []Kernel `json:"kernels,omitempty"`
}

// Kernel identifies the kernel of a COS build.
type Kernel struct {
	BuildID string `json:"buildId"`
	Board   string `json:"board"`
}

// Decode reads a list from its compressed file. It checks no signature; [Verify] does.
func Decode(file []byte) (*Catalogue, error) {
	c, err := decode(file)
	if err != nil {
		return nil, refusal(fmt.Errorf("read catalogue: %w: %w", ErrMalformed, err))
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
		return nil, errors.New("the catalogue has more than one JSON document")
	}
	return &c, c.Check()
}

// Check returns an error if clients would refuse the list because of its content.
func (c Catalogue) Check() error {
	if c.Schema != Schema {
		return fmt.Errorf("the catalogue has schema version %d; this program reads only version %d", c.Schema, Schema)
	}
	if c.MadeAt.IsZero() {
		return errors.New("the catalogue does not say when it was made")
	}
	for i, a := range c.Artifacts {
		if _, err := target.ParseFingerprint(a.Digest); err != nil { // a digest has the same form as a fingerprint
			return fmt.Errorf("artifact %d: digest %.80q: want sha256: and 64 lower-case hex digits", i+1, a.Digest)
		}
		if i > 0 && c.Artifacts[i-1].Digest >= a.Digest {
			return fmt.Errorf("artifact %s is listed twice, or at the wrong place of the sorted list", a.Digest)
		}
		switch a.State {
		case Published, Yanked, Quarantined:
		default:
			return fmt.Errorf("artifact %s has the unknown state %.40q", a.Digest, a.State)
		}
	}
	return nil
}

// Find returns the entry with this digest, if there is one.
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
