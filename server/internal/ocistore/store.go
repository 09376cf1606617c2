// Package ocistore is the embedded registry: the OCI distribution API over a
// folder. The protocol is CUE's ociserver; the storage below it is ours, see
// docs/decisions/0003-embedded-registry.md.
//
// Bytes become visible only whole, verified and synced: a kill at any moment
// leaves the store as it was before or after a push, never between. It refuses
// digests other than SHA-256, manifests whose blobs are missing, and a second
// meaning for a tag of a create-only repository.
//
// Layout of the folder:
//
//	blobs/sha256/<aa>/<hex>                    every blob and manifest, once
//	repos/<name>/_manifests/<hex>              descriptor: the manifest is in this repository
//	repos/<name>/_referrers/<subject>/<hex>    descriptor: the manifest has this subject
//	repos/<name>/_tags/<tag>                   descriptor of the manifest that the tag names
//	uploads/<id>                               bytes of an upload under way
//	tmp/                                       files that get renamed into place
package ocistore

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"sync"
	"time"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociref"
	"github.com/opencontainers/go-digest"
)

// Bounds. The largest real layer, firmware and user space of one driver, is
// some hundred MB.
const (
	MaxManifest  = 4 << 20
	MaxBlob      = 8 << 30
	uploadMaxAge = 24 * time.Hour
	maxName      = 255
)

// Store is a registry backend over a folder. One process may use a folder.
type Store struct {
	*ociregistry.Funcs // the methods that are not defined here are refused as unsupported

	root       *os.Root
	createOnly func(repo, tag string) bool

	mu   sync.Mutex
	busy map[string]bool // uploads that a request writes to right now
}

// Open opens the folder, making it if need be, and clears leftovers of a
// process that was killed. CreateOnly says of which tags the first meaning is
// the last; nil is none.
func Open(dir string, createOnly func(repo, tag string) bool) (*Store, error) {
	s, err := open(dir, createOnly)
	if err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	return s, nil
}

func open(dir string, createOnly func(repo, tag string) bool) (*Store, error) {
	if createOnly == nil {
		createOnly = func(string, string) bool { return false }
	}
	for _, sub := range []string{"blobs/sha256", "repos", "uploads"} {
		if err := os.MkdirAll(path.Join(dir, sub), 0o750); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{root: root, createOnly: createOnly, busy: map[string]bool{}}
	if err := s.clean(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return s, nil
}

// clean empties tmp and drops uploads that nobody will go on with.
func (s *Store) clean() error {
	if err := s.root.RemoveAll("tmp"); err != nil {
		return err
	}
	if err := s.root.Mkdir("tmp", 0o750); err != nil {
		return err
	}
	uploads, err := fs.ReadDir(s.root.FS(), "uploads")
	if err != nil {
		return err
	}
	for _, u := range uploads {
		info, err := u.Info()
		if err != nil {
			return err
		}
		if time.Since(info.ModTime()) > uploadMaxAge {
			if err := s.root.Remove("uploads/" + u.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close closes the folder.
func (s *Store) Close() error { return s.root.Close() }

var hexPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// hexOf returns the hex digits of a SHA-256 digest.
func hexOf(d ociregistry.Digest) (string, error) {
	sum, ok := strings.CutPrefix(string(d), "sha256:")
	if !ok || !hexPattern.MatchString(sum) {
		return "", fmt.Errorf("%w: %q is not a sha256 digest", ociregistry.ErrDigestInvalid, d)
	}
	return sum, nil
}

func blobPath(sum string) string { return "blobs/sha256/" + sum[:2] + "/" + sum }

// repoPath returns a path inside a repository's folder. Names of the protocol
// cannot begin with an underscore, so our own folders cannot collide with them.
func repoPath(repo string, parts ...string) (string, error) {
	if len(repo) > maxName || !ociref.IsValidRepository(repo) {
		return "", fmt.Errorf("%w: %q", ociregistry.ErrNameInvalid, repo)
	}
	return path.Join(append([]string{"repos", repo}, parts...)...), nil
}

func tagPath(repo, tag string) (string, error) {
	if !ociref.IsValidTag(tag) {
		return "", fmt.Errorf("%w: tag %q", ociregistry.ErrManifestInvalid, tag)
	}
	return repoPath(repo, "_tags", tag)
}

func randomID() string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails, see crypto/rand
	return hex.EncodeToString(id)
}

// syncDir makes a folder's entries durable.
func (s *Store) syncDir(dir string) error {
	f, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// adopt moves a finished file into place. It exists with the same content
// there already when the path is a digest's, so replacing it changes nothing.
func (s *Store) adopt(from, to string) error {
	if err := s.root.MkdirAll(path.Dir(to), 0o750); err != nil {
		return err
	}
	if err := s.root.Rename(from, to); err != nil {
		return err
	}
	return errors.Join(s.syncDir(path.Dir(to)), s.syncDir(path.Dir(path.Dir(to))))
}

// temp writes r to a synced file in tmp and returns its name.
func (s *Store) temp(r io.Reader) (name string, err error) {
	name = "tmp/" + randomID()
	f, err := s.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, r)
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
	name, err := s.temp(bytes.NewReader(raw))
	if err != nil {
		return err
	}
	return s.adopt(name, to)
}

// createJSON stores a small file unless one is there: fs.ErrExist.
func (s *Store) createJSON(to string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	name, err := s.temp(bytes.NewReader(raw))
	if err != nil {
		return err
	}
	if err = s.root.MkdirAll(path.Dir(to), 0o750); err == nil {
		err = s.root.Link(name, to)
	}
	if err = errors.Join(err, s.root.Remove(name)); err != nil {
		return err
	}
	return s.syncDir(path.Dir(to))
}

// readDescriptor reads one of our small files.
func (s *Store) readDescriptor(name string) (ociregistry.Descriptor, error) {
	var d ociregistry.Descriptor
	raw, err := s.root.ReadFile(name)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, fmt.Errorf("read %s: %w", name, err)
	}
	return d, nil
}

// has returns the size of a stored blob; fs.ErrNotExist when it is absent.
func (s *Store) has(d ociregistry.Digest) (int64, error) {
	sum, err := hexOf(d)
	if err != nil {
		return 0, err
	}
	info, err := s.root.Stat(blobPath(sum))
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// putBytes stores content that is in memory under its own digest.
func (s *Store) putBytes(content []byte) (ociregistry.Digest, error) {
	d := digest.FromBytes(content)
	if _, err := s.has(d); err == nil {
		return d, nil
	}
	name, err := s.temp(bytes.NewReader(content))
	if err != nil {
		return "", err
	}
	return d, s.adopt(name, blobPath(d.Encoded()))
}
