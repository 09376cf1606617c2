// Package snapshots makes signed snapshots for tests, and gives the tests all keys. It verifies nothing. Only test
// files import it.
package snapshots

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/snapshot/maker"
)

// Farm publishes snapshots in the folder Dir. Its root has three keys and requires the signatures of two of them.
type Farm struct {
	Dir                       string
	Root                      [3]signature.Signer
	Targets, Snapshot, Stamps signature.Signer
	// Least is the lowest version that the next list may have, for tests of a lost folder. 0 means one more than the last
	// version.
	Least int64
}

// New returns a farm whose first root expires one year after the given time.
func New(t testing.TB, at time.Time) *Farm {
	t.Helper()
	f := &Farm{
		Dir:      filepath.Join(t.TempDir(), "snapshot"),
		Targets:  NewSigner(t),
		Snapshot: NewSigner(t),
		Stamps:   NewSigner(t),
	}
	for i := range f.Root {
		f.Root[i] = NewSigner(t)
	}
	f.WriteRoot(t, at, f.Root[0], f.Root[2])
	return f
}

// NewSigner returns a new key.
func NewSigner(t testing.TB) signature.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	s, err := signature.LoadECDSASigner(key, crypto.SHA256)
	check(t, err)
	return s
}

// WriteRoot writes the next root, which lists the current keys of the farm.
func (f *Farm) WriteRoot(t testing.TB, at time.Time, by ...signature.Signer) {
	t.Helper()
	next := maker.Root{Threshold: 2, Signers: by, Expires: at.AddDate(1, 0, 0),
		Targets: public(t, f.Targets), Snapshot: public(t, f.Snapshot), Timestamp: public(t, f.Stamps)}
	for _, s := range f.Root {
		next.Keys = append(next.Keys, public(t, s))
	}
	r := f.Open(t, at)
	_, err := r.WriteRoot(next)
	check(t, errors.Join(err, r.Close()))
}

// Publish publishes a list. The list's timestamp expires after a week.
func (f *Farm) Publish(t testing.TB, at time.Time, artifacts ...snapshot.Artifact) {
	t.Helper()
	r := f.Open(t, at)
	_, err := r.Publish(snapshot.Catalogue{Schema: snapshot.Schema, MadeAt: at, Artifacts: artifacts},
		maker.Signers{Targets: f.Targets, Snapshot: f.Snapshot, Timestamp: f.Stamps},
		maker.Until{Targets: at.AddDate(0, 3, 0), Snapshot: at.AddDate(0, 1, 0), Timestamp: at.AddDate(0, 0, 7)}, f.Least)
	check(t, errors.Join(err, r.Close()))
}

// Refresh signs the timestamp of the newest list again, for another week.
func (f *Farm) Refresh(t testing.TB, at time.Time) {
	t.Helper()
	r := f.Open(t, at)
	_, err := r.Refresh(f.Stamps, at.AddDate(0, 0, 7))
	check(t, errors.Join(err, r.Close()))
}

// Open opens the folder with the given time as the clock. The caller closes it.
func (f *Farm) Open(t testing.TB, at time.Time) *maker.Repository {
	t.Helper()
	r, err := maker.Open(f.Dir, func() time.Time { return at })
	check(t, err)
	return r
}

// Copy copies the folder in its current state, so that a test can serve that state again later.
func (f *Farm) Copy(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "copy")
	check(t, os.CopyFS(dir, os.DirFS(f.Dir)))
	return dir
}

func public(t testing.TB, s signature.Signer) crypto.PublicKey {
	t.Helper()
	pub, err := s.PublicKey()
	check(t, err)
	return pub
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
