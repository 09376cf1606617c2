package ocistore

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
)

// mark says what is known about content that a manifest is or names.
type mark uint8

const (
	named  mark = 1 << iota // a manifest is or names it
	read                    // it is a manifest that was read; it may be in several repositories
	looked                  // it is a blob that findAbsent has looked for
)

// references are what the manifests of all repositories refer to. A registry may have some hundred thousand manifests
// and blobs, so their digests are kept as bytes: as strings, they need twice as much memory.
type references struct {
	short map[[sha256.Size]byte]mark
	long  map[[sha512.Size]byte]mark
	// damaged has the digests of damaged manifests. absent has the hex digits of needed blobs that are not there.
	damaged []string
	absent  map[string]bool
}

func newReferences() references {
	return references{short: map[[sha256.Size]byte]mark{}, long: map[[sha512.Size]byte]mark{}, absent: map[string]bool{}}
}

// names reports whether a manifest is or names the content with these hex digits.
func (r references) names(sum string) bool { return r.marks(sum) != 0 }

// marks returns the marks of the content with these hex digits.
func (r references) marks(sum string) mark {
	raw, err := hex.DecodeString(sum)
	switch {
	case err != nil: // it is not a digest
		return 0
	case len(raw) == sha256.Size:
		return r.short[[sha256.Size]byte(raw)]
	case len(raw) == sha512.Size:
		return r.long[[sha512.Size]byte(raw)]
	}
	return 0
}

// add marks the content with these hex digits, and reports whether it had this mark already.
func (r references) add(sum string, m mark) (had bool) {
	before := r.marks(sum)
	raw, err := hex.DecodeString(sum)
	switch {
	case err != nil || before&m == m:
	case len(raw) == sha256.Size:
		r.short[[sha256.Size]byte(raw)] = before | named | m
	case len(raw) == sha512.Size:
		r.long[[sha512.Size]byte(raw)] = before | named | m
	}
	return before&m == m
}
