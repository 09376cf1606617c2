// Package install keeps driver sets in a node's install folder and switches
// between them atomically. Everything of ours is below .prebake:
//
//	.prebake/layers/<hex>/      one unpacked layer, immutable, named by its digest
//	.prebake/sets/<hex>/        one artifact: links into layers, and set.json
//	.prebake/current, previous  links to sets; a rename of "current" is the switch
//	.prebake/adopted/<name>     what was at <name> before us
//	<name> -> .prebake/current/<name>, for bin, lib64, share, vulkan, drivers, firmware
//
// All links are relative, so the tree holds wherever it is mounted. The
// package refuses to give a layer or a set its final name before the caller
// says that it is verified, and to verify anything itself.
package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// ownFolder is our own folder below the install folder.
const ownFolder = ".prebake"

// roots says which top-level names come from which layer.
var roots = map[bundle.LayerKind][]string{
	bundle.LayerModules:   {"drivers"},
	bundle.LayerUserspace: {"bin", "lib64", "share", "vulkan"},
	bundle.LayerFirmware:  {"firmware"},
}

// names are all top-level names that we own, libraries before modules.
var names = []string{"lib64", "bin", "share", "vulkan", "firmware", "drivers"}

// Layer is one layer of a set.
type Layer struct {
	Kind   bundle.LayerKind `json:"kind"`
	Digest string           `json:"digest"`
	DiffID string           `json:"diffId"`
	Size   int64            `json:"size"`
}

// Module is one kernel module of a set, as it was when it was verified.
type Module struct {
	Name string `json:"name"`
	// File is the path below the install folder.
	File     string `json:"file"`
	SHA256   string `json:"sha256"`
	Size     int64  `json:"size"`
	Version  string `json:"version"`
	Vermagic string `json:"vermagic"`
	BuildID  string `json:"buildId,omitempty"`
	Signed   bool   `json:"signed,omitempty"`
}

// Origin says who made an artifact, and with that whose signature counts for it.
type Origin string

const (
	// Published is what a farm made, and the owner's keys and identities sign.
	Published Origin = "published"
	// MadeHere is what this node compiled for itself, and its own key signs. That key
	// counts for nothing else.
	MadeHere Origin = "node"
)

// Set is one installed artifact. What set.json says of it is no more than a note: whoever
// loads a set compares it with what was signed (see [Store.Evidence]).
type Set struct {
	// Digest is the artifact's manifest digest.
	Digest string `json:"digest"`
	// Origin is empty in sets of older releases: published.
	Origin     Origin        `json:"origin,omitempty"`
	Repository string        `json:"repository"`
	Kernel     target.Kernel `json:"kernel"`
	Driver     target.Driver `json:"driver"`
	Layers     []Layer       `json:"layers"`
	// Modules are in load order.
	Modules     []Module  `json:"modules"`
	InstalledAt time.Time `json:"installedAt"`
	// Damaged says that nothing but the digest is known.
	Damaged bool `json:"damaged,omitempty"`
}

// Store is the install folder of one node.
type Store struct {
	node *noderoot.Root
	dir  string
	root *os.Root
}

// Open opens the install folder of a node; with create it is made first.
func Open(node *noderoot.Root, dir string, create bool) (*Store, error) {
	if create {
		if err := node.MakeFolder(path.Join(dir, ownFolder), 0o755); err != nil {
			return nil, diskFault(fmt.Errorf("make install folder: %w", err))
		}
	}
	root, err := node.Folder(dir)
	if err != nil {
		return nil, fmt.Errorf("open install folder: %w", err)
	}
	s := &Store{node: node, dir: dir, root: root}
	if create {
		for _, sub := range []string{"layers", "sets", "adopted"} {
			if err := root.MkdirAll(path.Join(ownFolder, sub), 0o755); err != nil {
				return nil, errors.Join(diskFault(fmt.Errorf("make install folder: %w", err)), root.Close())
			}
		}
	}
	return s, nil
}

// Close releases the folder.
func (s *Store) Close() error { return s.root.Close() }

// hexOf returns the folder name of a digest, which came over the network.
func hexOf(digest string) (string, error) {
	f, err := target.ParseFingerprint(digest) // the same form: sha256: and 64 lower-case hex digits
	if err != nil {
		return "", fault.New(fault.Unverified, fmt.Sprintf("digest %q: want sha256: and 64 lower-case hex digits", digest),
			"")
	}
	return strings.TrimPrefix(string(f), "sha256:"), nil
}

// add fills a temporary folder, flushes it to disk and renames it to its final
// name below our own folder.
func (s *Store) add(final string, fill func(dst *os.Root) error) (err error) {
	tmp := path.Join(ownFolder, "tmp-"+path.Base(final))
	final = path.Join(ownFolder, final)
	if err := s.root.RemoveAll(tmp); err != nil {
		return fmt.Errorf("clear staging folder: %w", err)
	}
	if err := s.root.Mkdir(tmp, 0o755); err != nil {
		return diskFault(fmt.Errorf("make staging folder: %w", err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(diskFault(err), s.root.RemoveAll(tmp))
		}
	}()
	dst, err := s.root.OpenRoot(tmp)
	if err != nil {
		return fmt.Errorf("open staging folder: %w", err)
	}
	if err := errors.Join(fill(dst), dst.Close()); err != nil {
		return err
	}
	if err := s.sync(); err != nil {
		return err
	}
	err = s.root.Rename(tmp, final)
	if err != nil { // what has that name goes, whatever it is: this one is verified
		if _, there := s.root.Lstat(final); there == nil {
			err = s.exchange(tmp, final)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
				if err = s.root.RemoveAll(final); err == nil {
					return s.root.Rename(tmp, final)
				}
			}
			if err == nil {
				return s.root.RemoveAll(tmp)
			}
		}
		return fmt.Errorf("name staged folder: %w", err)
	}
	return nil
}

// Sync flushes the filesystem, so that what was written outlives a crash.
func (s *Store) Sync() error { return s.sync() }

// sync flushes the filesystem, so that no name outlives its bytes in a crash.
func (s *Store) sync() error { return s.flush(ownFolder) }

func (s *Store) flush(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return fmt.Errorf("open install folder: %w", err)
	}
	err = unix.Syncfs(int(d.Fd()))
	if err != nil {
		err = fmt.Errorf("flush install folder: %w", err)
	}
	return errors.Join(err, d.Close())
}

// evidenceFile holds what a set was verified by, beside its links.
const evidenceFile = "proof.json"

// maxEvidence bounds it: a manifest, a config, and as many statements as are examined.
const maxEvidence = 64 << 20

// Evidence returns what a set was verified by, as it was given to [Store.AddSet]; nil where
// there is none, as in sets of older releases.
func (s *Store) Evidence(digest string) ([]byte, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	return s.readFile(path.Join(ownFolder, "sets", name, evidenceFile), maxEvidence)
}

// AddSet writes a set whose layers are all there, and what it was verified by. It is
// not in force before [Store.Switch].
func (s *Store) AddSet(set Set, proof []byte) error {
	name, err := hexOf(set.Digest)
	if err != nil {
		return err
	}
	raw, err := json.MarshalIndent(set, "", "  ")
	if err != nil {
		return fmt.Errorf("encode set: %w", err)
	}
	raw = append(raw, '\n')
	links, err := s.links(set)
	if err != nil {
		return err
	}
	final := path.Join("sets", name)
	if info, err := s.root.Lstat(path.Join(ownFolder, final)); err == nil && info.IsDir() {
		// The same artifact again, possibly for another COS build of its fingerprint, or
		// fetched anew: it may be the one in force, so it changes name by name.
		for _, name := range names {
			if at := path.Join(ownFolder, final, name); links[name] == "" {
				err = s.root.RemoveAll(at)
			} else if to, lerr := s.root.Readlink(at); lerr != nil || to != links[name] {
				err = s.replaceByLink(at, links[name])
			}
			if err != nil {
				return fmt.Errorf("link layer: %w", err)
			}
		}
		return errors.Join(s.WriteFile(path.Join(ownFolder, final, evidenceFile), proof),
			s.WriteFile(path.Join(ownFolder, final, "set.json"), raw))
	}
	return s.add(final, func(dst *os.Root) error {
		for name, to := range links {
			if err := dst.Symlink(to, name); err != nil {
				return fmt.Errorf("link layer: %w", err)
			}
		}
		return errors.Join(dst.WriteFile(evidenceFile, proof, 0o644), dst.WriteFile("set.json", raw, 0o644))
	})
}

// replaceByLink puts a link where something else is.
func (s *Store) replaceByLink(name, to string) error {
	if info, err := s.root.Lstat(name); err == nil && info.Mode().Type() != fs.ModeSymlink {
		if err := s.root.RemoveAll(name); err != nil {
			return err
		}
	}
	return s.point(name, to)
}

// links are the links of a set into its layers, by their names.
func (s *Store) links(set Set) (map[string]string, error) {
	links := map[string]string{}
	for _, l := range set.Layers {
		layer, err := hexOf(l.Digest)
		if err != nil {
			return nil, err
		}
		for _, name := range roots[l.Kind] {
			_, err := s.root.Stat(path.Join(ownFolder, "layers", layer, name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("look into layer: %w", err)
			}
			links[name] = path.Join("..", "..", "layers", layer, name)
		}
	}
	return links, nil
}

// LinksHold reports whether a set's names lead into its layers, and nowhere else.
func (s *Store) LinksHold(set Set) error {
	hex, err := hexOf(set.Digest)
	if err != nil {
		return err
	}
	links, err := s.links(set)
	if err != nil {
		return err
	}
	for _, name := range names {
		to, err := s.root.Readlink(path.Join(ownFolder, "sets", hex, name))
		if errors.Is(err, fs.ErrNotExist) {
			to, err = "", nil
		}
		if err != nil || to != links[name] {
			return fault.New(fault.Unverified, fmt.Sprintf("the set's %s is %q; want a link to %q", name, to, links[name]),
				"run fetcher install again")
		}
	}
	return nil
}

// Current returns the set in force, or nil when there is none.
func (s *Store) Current() (*Set, error) { return s.readSet("current") }

// Previous returns the set that was in force before, or nil.
func (s *Store) Previous() (*Set, error) { return s.readSet("previous") }

// Set returns a set by its artifact's digest, or nil where it is not staged.
func (s *Store) Set(digest string) (*Set, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	return s.readSet(path.Join("sets", name))
}

// Sets returns all sets that are staged. One that cannot be read is left out.
func (s *Store) Sets() ([]*Set, error) {
	entries, err := fs.ReadDir(s.root.FS(), path.Join(ownFolder, "sets"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	var all []*Set
	for _, e := range entries {
		if set, err := s.Set("sha256:" + e.Name()); err == nil && set != nil {
			all = append(all, set)
		}
	}
	return all, nil
}

// SetAt returns the set that one of [Pointers] names, or nil where it is gone.
func (s *Store) SetAt(pointer string) (*Set, error) {
	digest, ok := strings.CutPrefix(pointer, "sets/")
	if !ok {
		return nil, fault.New(fault.Unverified, fmt.Sprintf("%.200q is no set of this folder", pointer),
			"remove "+ownFolder+" in the install folder and install again")
	}
	return s.Set("sha256:" + digest)
}

// maxSet bounds set.json; a real one has a few kilobytes.
const maxSet = 1 << 20

// readSet reads a set below our folder. Of one whose note cannot be read the digest alone
// is known: nothing fits it, and the next run that is answered writes it again.
func (s *Store) readSet(link string) (*Set, error) {
	raw, err := s.readFile(path.Join(ownFolder, link, "set.json"), maxSet)
	if err == nil && raw == nil {
		return nil, nil
	}
	var set Set
	if err == nil && json.Unmarshal(raw, &set) == nil && set.Digest != "" {
		return &set, nil
	}
	to := link
	if !strings.HasPrefix(link, "sets/") {
		if to, err = s.link(link); err != nil {
			return nil, err
		}
	}
	return &Set{Digest: "sha256:" + path.Base(to), Damaged: true}, nil
}

// diskFault marks an error that says that the disk is full.
func diskFault(err error) error {
	return fault.Disk(err, "free space below the install folder, or name another with --install-dir")
}
