// Package ocistore is the embedded registry: the OCI distribution API over a folder. CUE's ociserver handles the
// protocol, and this package stores the content: docs/decisions/0003-embedded-registry.md.
//
// Content becomes visible only when it is complete, verified and synced. After a crash, a push is either complete or
// absent. The package accepts only SHA-256 and SHA-512 digests, and no manifests with missing blobs. It never moves a
// create-only tag to another manifest.
//
// Layout of the folder:
//
//	blobs/<algorithm>/<aa>/<hex>               every blob and manifest, once
//	repos/<name>/_manifests/<hex>              descriptor: the manifest is in this repository
//	repos/<name>/_referrers/<subject>/<hex>    descriptor: the manifest has this subject
//	repos/<name>/_tags/<tag>                   descriptor of the tag's manifest
//	repos/<name>/_retired/<tag>                descriptor of the deleted manifest of a create-only tag
//	damaged/<hex>                              damaged content, until it reads well, is pushed again, or is not needed
//	verified                                   how far the verification of all blobs has come, and what it could not read
//	uploads/<id>                               content of a running upload
//	tmp/                                       files that are renamed to their final name
package ocistore

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"sync"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociref"
	"github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/bundle"
)

// MaxManifest and MaxBlob are the maximum sizes in bytes. The largest real blob, a driver's layer, has some hundred MB.
const (
	MaxManifest = 4 << 20
	MaxBlob     = 8 << 30
	// uploadMaxAge is how long an idle upload is kept. blobMinAge is how long an unreferenced blob is kept. blobMinAge
	// must be longer than a push, because clients push blobs before their manifest.
	uploadMaxAge = 6 * time.Hour
	blobMinAge   = 24 * time.Hour
	maxName      = 255
)

// Options has the settings that differ between registries.
type Options struct {
	// CreateOnly reports whether a tag must refer to the same manifest for ever. nil means that no tag must.
	CreateOnly func(repo, tag string) bool
	// Forget is called before and after a manifest is deleted, and for a request to delete a missing one. It removes
	// what else refers to the manifest. After an error, the request fails, and the client may repeat it. nil means no
	// call.
	Forget func(repo string, d ociregistry.Digest) error
	// Public is true if everybody can read this registry (--public). The registry then refuses content under NVIDIA's
	// licence that Redistribute does not allow. The level "" allows none.
	Public       bool
	Redistribute bundle.Redistribution
	// CheckFree returns an error if there is no room to write. It is called when a write begins, and again after each
	// checkEvery bytes. nil means no check.
	CheckFree func() error
	// Now returns the time, which decides when an upload is idle. nil means [time.Now].
	Now func() time.Time
	// Log gets a line for each damaged entry of a repository, once. nil means no log.
	Log *slog.Logger
}

// Store stores a registry in a folder. Only one process may use the folder.
type Store struct {
	*ociregistry.Funcs // methods that Store does not define return the error "unsupported"

	root       *os.Root
	openBlob   func(name string) (fs.File, error) // to read and verify a blob
	createOnly func(repo, tag string) bool
	forget     func(repo string, d ociregistry.Digest) error
	checkFree  func() error
	now        func() time.Time
	log        *slog.Logger

	public       bool
	redistribute bundle.Redistribution

	mu   sync.Mutex
	busy map[string]bool // uploads that a request writes to at this moment
	// owners has the caller who began each open upload since the start.
	owners map[string]string
	// absent has the hex digits of damaged and lost content. It may still have some that was pushed again; see lacks.
	absent map[string]bool
	// kept has the paths of files and folders that a verification could not read or move.
	kept map[string]bool
	// reread has the times when content in the folder damaged was read again, by the content's hex digits.
	reread map[string]time.Time
	logged map[string]bool // damaged entries that the log has

	// collecting is held for writing while a blob is deleted or moved to the folder damaged. It is held for reading while
	// a blob gets its final path, and while a manifest is checked and stored.
	collecting sync.RWMutex
}

// Open opens the folder, or makes it. It removes the remains of a killed process.
func Open(dir string, o Options) (*Store, error) {
	s, err := open(dir, o)
	if err != nil {
		return nil, fmt.Errorf("open the registry: %w", err)
	}
	return s, nil
}

func open(dir string, o Options) (*Store, error) {
	if o.CreateOnly == nil {
		o.CreateOnly = func(string, string) bool { return false }
	}
	if o.Forget == nil {
		o.Forget = func(string, ociregistry.Digest) error { return nil }
	}
	if o.CheckFree == nil {
		o.CheckFree = func() error { return nil }
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	for _, sub := range []string{"blobs", "repos", "uploads", "damaged"} {
		if err := os.MkdirAll(path.Join(dir, sub), 0o750); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{
		root:         root,
		openBlob:     func(name string) (fs.File, error) { return root.Open(name) },
		createOnly:   o.CreateOnly,
		forget:       o.Forget,
		checkFree:    o.CheckFree,
		now:          o.Now,
		log:          o.Log,
		busy:         map[string]bool{},
		owners:       map[string]string{},
		absent:       map[string]bool{},
		kept:         map[string]bool{},
		reread:       map[string]time.Time{},
		logged:       map[string]bool{},
		public:       o.Public,
		redistribute: o.Redistribute,
	}
	if err := errors.Join(s.removeRemains(), s.readAbsent()); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return s, nil
}

// removeRemains removes all files in the folder tmp, and abandoned uploads.
func (s *Store) removeRemains() error {
	if err := s.root.RemoveAll("tmp"); err != nil {
		return err
	}
	if err := s.root.Mkdir("tmp", 0o750); err != nil {
		return err
	}
	_, err := s.dropUploads(time.Now(), uploadMaxAge)
	return err
}

// dropUploads removes uploads that nobody has written to for longer than age, and returns their number.
func (s *Store) dropUploads(now time.Time, age time.Duration) (n int, err error) {
	uploads, err := fs.ReadDir(s.root.FS(), "uploads")
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, u := range uploads {
		info, err := u.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // the upload ended meanwhile
		}
		if err == nil && now.Sub(info.ModTime()) > age {
			switch err = s.CancelUpload(u.Name()); {
			case err == nil:
				n++
			case errors.Is(err, ociregistry.ErrBlobUploadInvalid), errors.Is(err, ociregistry.ErrBlobUploadUnknown):
				err = nil // a request continues this upload, or has ended it
			}
		}
		errs = append(errs, err)
	}
	return n, errors.Join(errs...)
}

// needRoom returns an error if there is no room to write. If there is none at first, it removes the idle uploads of all
// callers and checks again.
func (s *Store) needRoom() error {
	full := s.checkFree()
	if full == nil {
		return nil
	}
	_, err := s.dropUploads(s.now(), uploadIdle)
	if full = s.checkFree(); full != nil { // another request may have made room
		return errors.Join(full, err)
	}
	return nil
}

// Close closes the folder.
func (s *Store) Close() error { return s.root.Close() }

// hexOf returns the hex digits of a digest. Their number shows whether it is SHA-256 or SHA-512.
func hexOf(d ociregistry.Digest) (string, error) {
	if err := digest.Digest(d).Validate(); err != nil {
		return "", fmt.Errorf("%w: %q: %w", ociregistry.ErrDigestInvalid, d, err)
	}
	switch a := digest.Digest(d).Algorithm(); a {
	case digest.SHA256, digest.SHA512:
		return digest.Digest(d).Encoded(), nil
	}
	return "", fmt.Errorf("%w: %q is neither a sha256 nor a sha512 digest", ociregistry.ErrDigestInvalid, d)
}

// algorithm returns the algorithm of a digest, which follows from the number of its hex digits.
func algorithm(sum string) digest.Algorithm {
	if len(sum) == 2*digest.SHA512.Size() {
		return digest.SHA512
	}
	return digest.SHA256
}

func blobPath(sum string) string {
	return "blobs/" + string(algorithm(sum)) + "/" + sum[:2] + "/" + sum
}

// repoPath returns a path in a repository's folder. Our own folders there begin with an underscore, so that they cannot
// be parts of a repository's name.
func repoPath(repo string, parts ...string) (string, error) {
	if len(repo) > maxName || !ociref.IsValidRepository(repo) {
		return "", fmt.Errorf("%w: %q", ociregistry.ErrNameInvalid, repo)
	}
	return path.Join(append([]string{"repos", repo}, parts...)...), nil
}

func tagPath(repo, tag string) (string, error) {
	if tag == "" || !ociref.IsValidTag(tag) { // IsValidTag panics if the tag is empty
		return "", fmt.Errorf("%w: %q is not a valid tag", ociregistry.ErrManifestInvalid, tag)
	}
	return repoPath(repo, "_tags", tag)
}

func randomID() string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails, see crypto/rand
	return hex.EncodeToString(id)
}

// syncDir calls fsync on a folder, so that the names of its files survive a crash.
func (s *Store) syncDir(dir string) error {
	f, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// moveToFinal moves a complete file to its final path. It replaces a file there.
func (s *Store) moveToFinal(from, to string) error {
	if err := s.mkdirs(path.Dir(to)); err != nil {
		return err
	}
	if err := s.root.Rename(from, to); err != nil {
		return err
	}
	return s.syncDir(path.Dir(to))
}

// moveBlob moves a complete blob from a file to its final path.
func (s *Store) moveBlob(from, sum string) error {
	s.collecting.RLock()
	defer s.collecting.RUnlock()
	return s.moveToFinal(from, blobPath(sum))
}

// mkdirs makes a folder and its parents, and calls fsync for each of them.
func (s *Store) mkdirs(dir string) error {
	if _, err := s.root.Stat(dir); err == nil || dir == "." {
		return err
	}
	if err := s.mkdirs(path.Dir(dir)); err != nil {
		return err
	}
	if err := s.root.Mkdir(dir, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return s.syncDir(path.Dir(dir))
}

// checkEvery is how many bytes are written between two checks of the free space.
const checkEvery = 16 << 20

// checkedReader checks the free space again after each checkEvery bytes.
type checkedReader struct {
	io.Reader
	check func() error
	n     int
}

func (r *checkedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if r.n += n; r.n >= checkEvery {
		r.n = 0
		err = cmp.Or(r.check(), err)
	}
	return n, err
}

// writeTemp writes r to a new file in the folder tmp, calls fsync, and returns the file's path.
func (s *Store) writeTemp(r io.Reader) (name string, err error) {
	if err := s.needRoom(); err != nil {
		return "", err
	}
	name = "tmp/" + randomID()
	f, err := s.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, &checkedReader{Reader: r, check: s.needRoom})
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, s.root.Remove(name))
	}
	return name, nil
}

// writeJSON stores a small file atomically.
func (s *Store) writeJSON(to string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	name, err := s.writeTemp(bytes.NewReader(raw))
	if err != nil {
		return err
	}
	return s.moveToFinal(name, to)
}

// createJSON stores a small file, unless a file exists there: then it returns fs.ErrExist.
func (s *Store) createJSON(to string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	name, err := s.writeTemp(bytes.NewReader(raw))
	if err != nil {
		return err
	}
	if err = s.mkdirs(path.Dir(to)); err == nil {
		err = s.root.Link(name, to)
	}
	if err = errors.Join(err, s.root.Remove(name)); err != nil {
		return err
	}
	return s.syncDir(path.Dir(to))
}

// errDamaged is the error if a file has content that the store cannot have written.
var errDamaged = errors.New("damaged")

// readDescriptor reads a descriptor from a file. For other content, the error is errDamaged.
func (s *Store) readDescriptor(name string) (ociregistry.Descriptor, error) {
	var d ociregistry.Descriptor
	raw, err := s.root.ReadFile(name)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, fmt.Errorf("read %s: %w: %w", name, errDamaged, err)
	}
	return d, nil
}

// statBlob returns the size of a stored blob, or fs.ErrNotExist. It makes the blob new again, because the client will
// probably push a manifest with it. [Store.Collect] then keeps the blob for a day.
func (s *Store) statBlob(d ociregistry.Digest) (int64, error) {
	sum, err := hexOf(d)
	if err != nil {
		return 0, err
	}
	info, err := s.root.Stat(blobPath(sum))
	if err != nil {
		return 0, err
	}
	return info.Size(), s.touch(blobPath(sum), info)
}

// putBytes stores content as the blob with the digest d. It replaces a damaged file.
func (s *Store) putBytes(d digest.Digest, content []byte) error {
	if size, err := s.statBlob(d); err == nil && size == int64(len(content)) {
		if old, err := s.root.ReadFile(blobPath(d.Encoded())); err == nil && bytes.Equal(old, content) {
			return nil
		}
	}
	name, err := s.writeTemp(bytes.NewReader(content))
	if err != nil {
		return err
	}
	return s.moveToFinal(name, blobPath(d.Encoded()))
}
