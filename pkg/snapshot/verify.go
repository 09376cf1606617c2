package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/trustedmetadata"

	"github.com/prebake/prebake/pkg/fault"
)

// The reasons why a client refuses a list. A caller finds the reason with errors.Is.
var (
	ErrExpired   = errors.New("the snapshot has expired")
	ErrRollback  = errors.New("the snapshot is older than one that was seen before")
	ErrAltered   = errors.New("a file differs from the signed file, or belongs to another snapshot")
	ErrSignature = errors.New("the snapshot is not signed by enough of the trusted keys")
	ErrMalformed = errors.New("the snapshot is malformed")
	// ErrEndless is a special case of ErrAltered: a file is longer than its signed length.
	ErrEndless = fmt.Errorf("%w: the file has more bytes than its signed size", ErrAltered)
)

const hintSource = "check that the source serves all files of one run of \"builder snapshot make\"; " +
	"if it does, something on the network path changes the files"

// refusal adds the kind Unverified and a hint to the reason why a list is refused.
func refusal(err error) error { return fault.Wrap(fault.Unverified, err, hintSource) }

// explain adds one of the reasons above to an error of the TUF library. The library's message stays in the text.
func explain(err error) error {
	for _, known := range []struct{ is, reason error }{
		{&metadata.ErrExpiredMetadata{}, ErrExpired},
		{&metadata.ErrBadVersionNumber{}, ErrRollback},
		{&metadata.ErrUnsignedMetadata{}, ErrSignature},
		{&metadata.ErrLengthOrHashMismatch{}, ErrAltered},
		{&metadata.ErrDownloadLengthMismatch{}, ErrEndless},
	} {
		if !errors.Is(err, known.is) {
			continue
		}
		if errors.Is(known.reason, ErrExpired) {
			return fault.Wrap(
				fault.Unverified,
				fmt.Errorf("%w: %w", ErrExpired, err),
				"check that the source serves the newest files; if it does, sign a new timestamp: builder snapshot refresh",
			)
		}
		return refusal(fmt.Errorf("%w: %w", known.reason, err))
	}
	var missing *metadata.ErrDownloadHTTP
	switch {
	case errors.As(err, &missing):
		return fault.Wrap(
			fault.Transient,
			fmt.Errorf("%s does not exist (HTTP status %d)", missing.URL, missing.StatusCode),
			"check the address of the snapshot, and that all files of the folder were copied to it",
		)
	case fault.Of(err) != fault.Internal:
		return err // an error of the transfer
	}
	return refusal(fmt.Errorf("%w: %w", ErrMalformed, err))
}

// Files are the parts of a snapshot, as the source serves them.
type Files struct {
	Root      []byte `json:"root"`
	Timestamp []byte `json:"timestamp"`
	Snapshot  []byte `json:"snapshot"`
	Targets   []byte `json:"targets"`
	Catalogue []byte `json:"catalogue"`
}

// Snapshot is a list with valid signatures.
type Snapshot struct {
	Catalogue
	// Version is the version of the list. Refreshed is the version of the timestamp, which grows with each refresh.
	Version, Refreshed int64
	// Expires is the time at which the first part of the snapshot expires.
	Expires time.Time
	// Former is true if the list was accepted under a root that the owner does not trust any more. The list then has
	// only the withdrawn artifacts.
	Former bool
}

// Verify checks that the keys of the snapshot's root signed its parts, and that the parts belong together. The caller
// compares Expires with the clock. [Client] checks that the root is trusted, and that no newer list was seen.
func Verify(f Files) (*Snapshot, error) {
	s, err := recoverPanic(func() (*Snapshot, error) { return verify(f) })
	if err != nil {
		return nil, fmt.Errorf("verify snapshot: %w", err)
	}
	return s, nil
}

func verify(f Files) (*Snapshot, error) {
	trusted, err := trustedmetadata.New(f.Root)
	if err != nil {
		return nil, explain(err)
	}
	trusted.RefTime = time.Time{} // before any expiry time
	if _, err := trusted.UpdateTimestamp(f.Timestamp); err != nil {
		return nil, explain(err)
	}
	if trusted.Timestamp.Signed.Meta[metadata.SNAPSHOT+".json"] == nil { // the library would dereference it
		return nil, refusal(fmt.Errorf("%w: the timestamp has no entry for a snapshot", ErrMalformed))
	}
	if _, err := trusted.UpdateSnapshot(f.Snapshot, false); err != nil {
		return nil, explain(err)
	}
	targets, err := trusted.UpdateTargets(f.Targets)
	if err != nil {
		return nil, explain(err)
	}
	info := targets.Signed.Targets[Name]
	if info == nil {
		return nil, refusal(fmt.Errorf("%w: the list of targets has no %s", ErrMalformed, Name))
	}
	if err := info.VerifyLengthHashes(f.Catalogue); err != nil {
		return nil, explain(err)
	}
	list, err := Decode(f.Catalogue)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{
		Catalogue: *list,
		Version:   targets.Signed.Version,
		Refreshed: trusted.Timestamp.Signed.Version,
		Expires:   trusted.Root.Signed.Expires,
	}
	for _, at := range []time.Time{trusted.Timestamp.Signed.Expires, trusted.Snapshot.Signed.Expires,
		targets.Signed.Expires} {
		if at.Before(s.Expires) {
			s.Expires = at
		}
	}
	return s, nil
}

// checkRoot checks that a text is root metadata, signed by its own keys.
func checkRoot(text []byte) error {
	if _, err := trustedmetadata.New(bytes.Clone(text)); err != nil {
		return fmt.Errorf(
			"read root metadata of snapshot: %w",
			fault.Wrap(fault.Usage, err, "give a file N.root.json that \"builder snapshot root\" wrote"),
		)
	}
	return nil
}

// recoverPanic turns a panic into an error of kind Unverified. The TUF library panics on null parts of metadata, before
// it checks the signature.
func recoverPanic[T any](do func() (T, error)) (_ T, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = refusal(fmt.Errorf("%w: %v", ErrMalformed, p))
		}
	}()
	return do()
}
