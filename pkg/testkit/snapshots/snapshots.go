// Package snapshots makes signed lists for tests, and has all the keys. Only test files import
// it. It refuses to check anything.
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

// Farm makes snapshots in Dir. Its root wants two of three keys.
type Farm struct {
	Dir                       string
	Root                      [3]signature.Signer
	Targets, Snapshot, Stamps signature.Signer
	// Least is the lowest version of the next list, as where the folder was lost.
	Least int64
}

// New makes a farm whose first root expires a year after a time.
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

// NewSigner makes a key.
func NewSigner(t testing.TB) signature.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	s, err := signature.LoadECDSASigner(key, crypto.SHA256)
	check(t, err)
	return s
}

// WriteRoot writes the next root, which names the farm's keys as they are now.
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

// Publish makes a list. Its timestamp expires after a week.
func (f *Farm) Publish(t testing.TB, at time.Time, artifacts ...snapshot.Artifact) {
	t.Helper()
	r := f.Open(t, at)
	_, err := r.Publish(snapshot.Catalogue{Schema: snapshot.Schema, MadeAt: at, Artifacts: artifacts},
		maker.Signers{Targets: f.Targets, Snapshot: f.Snapshot, Timestamp: f.Stamps},
		maker.Until{Targets: at.AddDate(0, 3, 0), Snapshot: at.AddDate(0, 1, 0), Timestamp: at.AddDate(0, 0, 7)}, f.Least)
	check(t, errors.Join(err, r.Close()))
}

// Refresh says that the newest list is the newest for another week.
func (f *Farm) Refresh(t testing.TB, at time.Time) {
	t.Helper()
	r := f.Open(t, at)
	_, err := r.Refresh(f.Stamps, at.AddDate(0, 0, 7))
	check(t, errors.Join(err, r.Close()))
}

// Open opens the folder, as if it were this time. The caller closes it.
func (f *Farm) Open(t testing.TB, at time.Time) *maker.Repository {
	t.Helper()
	r, err := maker.Open(f.Dir, func() time.Time { return at })
	check(t, err)
	return r
}

// Copy copies the folder as it is now, as somebody keeps it who means to serve it again later.
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
