// Package install keeps drivers in a node's install folder and switches between them atomically. A set is the files
// of one driver on the disk. All files of this program are below .prebake:
//
//	.prebake/layers/<hex>/      one unpacked layer, immutable, named by its digest
//	.prebake/sets/<hex>/        one artifact: links into layers, and set.json
//	.prebake/current, previous  links to sets; a rename of "current" is the switch
//	.prebake/adopted/<name>     the file or folder that was at <name> before, or at .prebake/<name>
//	<name> -> .prebake/current/<name>, for bin, lib64, share, vulkan, drivers, firmware
//
// All links are relative, so the tree works wherever it is mounted. The package verifies nothing. The caller must
// verify a layer or a set before the package gives it its final name.
package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// ownFolder is this program's folder below the install folder.
const ownFolder = ".prebake"

// roots lists the top-level names that come from each kind of layer.
var roots = map[bundle.LayerKind][]string{
	bundle.LayerModules:   {"drivers"},
	bundle.LayerUserspace: {"bin", "lib64", "share", "vulkan"},
	bundle.LayerFirmware:  {"firmware"},
}

// names are the top-level names in the install folder, libraries before modules.
var names = []string{"lib64", "bin", "share", "vulkan", "firmware", "drivers"}

// Layer is one layer of a set.
type Layer struct {
	Kind   bundle.LayerKind `json:"kind"`
	Digest string           `json:"digest"`
	DiffID string           `json:"diffId"`
	Size   int64            `json:"size"`
}

// Module is one kernel module of a set, as its verification found it.
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

// Origin says who made an artifact. It decides whose signature the artifact needs.
type Origin string

const (
	// Published artifacts come from a farm. The owner's keys and identities sign them.
	Published Origin = "published"
	// MadeHere artifacts are compiled on this node and signed by its own key. The key counts for no other artifacts.
	MadeHere Origin = "node"
)

// Set describes one unpacked artifact, active or not. It comes from set.json, which is not trusted: before a load,
// compare it with the signed statements (see [Store.Evidence]).
type Set struct {
	// Digest is the artifact's manifest digest.
	Digest string `json:"digest"`
	// Origin is empty in sets of older releases, and then means Published.
	Origin Origin `json:"origin,omitempty"`
	// Wish is the wish for which this node compiled the artifact. It is empty for Published artifacts, and in sets of
	// older releases. It may decide that the node need not compile again, but nothing else.
	Wish       target.Wish   `json:"wish,omitempty"`
	Repository string        `json:"repository"`
	Kernel     target.Kernel `json:"kernel"`
	Driver     target.Driver `json:"driver"`
	Layers     []Layer       `json:"layers"`
	// Modules are in load order.
	Modules     []Module  `json:"modules"`
	InstalledAt time.Time `json:"installedAt"`
	// Damaged means that set.json could not be read, so that only Digest is known.
	Damaged bool `json:"damaged,omitempty"`
}

// Store is the install folder of one node.
type Store struct {
	node *noderoot.Root
	dir  string
	root *os.Root
	// files is held while a small file is replaced.
	files sync.Mutex
	// PutAside is called after a file or folder that had the name of a pointer was moved aside. path is its new path.
	// PutAside may be nil.
	PutAside func(path string)
}

// Open opens the install folder of a node. If create is true, it creates a missing folder.
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

// Close closes the folder.
func (s *Store) Close() error { return s.root.Close() }

// hexOf returns the folder name for a digest. It validates the digest, which comes from the network.
func hexOf(digest string) (string, error) {
	f, err := target.ParseFingerprint(digest) // a fingerprint has the same format: sha256: and 64 lower-case hex digits
	if err != nil {
		return "", fault.New(fault.Unverified, fmt.Sprintf("digest %q: want sha256: and 64 lower-case hex digits", digest),
			"")
	}
	return strings.TrimPrefix(string(f), "sha256:"), nil
}

// add fills a temporary folder, flushes it to disk and renames it to its final name below ownFolder.
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
	if err != nil { // replace whatever has that name, because the new folder is verified
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
		return fmt.Errorf("rename staged folder: %w", err)
	}
	return nil
}

// Free returns the number of bytes that root can still write to the file system. For a ramfs, which has no limit of its
// own, it returns [math.MaxInt64].
func (s *Store) Free() (_ int64, err error) {
	d, err := s.root.Open(".")
	if err != nil {
		return 0, fmt.Errorf("open install folder: %w", err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(d.Fd()), &st); err != nil {
		return 0, fmt.Errorf("ask for the free space of the install folder: %w", err)
	}
	if st.Blocks == 0 {
		return math.MaxInt64, nil
	}
	return int64(st.Bfree) * st.Frsize, nil //nolint:gosec // no disk has 2^63 bytes
}

// Sync flushes the file system, so that written files survive a crash.
func (s *Store) Sync() error { return s.sync() }

// sync flushes the file system: after a crash, each existing file has its whole content.
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

// evidenceFile is the file with the evidence of a set, in the set's folder.
const evidenceFile = "proof.json"

// maxEvidence is the maximum size of the evidence in bytes: a manifest, a config, and all examined statements.
const maxEvidence = 64 << 20

// Evidence returns the evidence that [Store.AddSet] stored. It returns nil if the set has no evidence, as sets of older
// releases.
func (s *Store) Evidence(digest string) ([]byte, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	return s.readFile(path.Join(ownFolder, "sets", name, evidenceFile), maxEvidence)
}

// AddSet writes a set and its evidence, without making the set active. All layers must be unpacked already.
func (s *Store) AddSet(set Set, proof []byte) error {
	name, err := hexOf(set.Digest)
	if err != nil {
		return err
	}
	raw, err := json.MarshalIndent(set, "", "  ")
	if err != nil {
		return fmt.Errorf("encode description of driver: %w", err)
	}
	raw = append(raw, '\n')
	links, err := s.links(set)
	if err != nil {
		return err
	}
	final := path.Join("sets", name)
	if info, err := s.root.Lstat(path.Join(ownFolder, final)); err == nil && info.IsDir() {
		// The artifact is already on the disk and may be active, so replace its links one by one.
		for _, name := range names {
			if at := path.Join(ownFolder, final, name); links[name] == "" {
				err = s.root.RemoveAll(at)
			} else if to, lerr := s.root.Readlink(at); lerr != nil || to != links[name] {
				err = s.replaceByLink(at, links[name])
			}
			if err != nil {
				return fmt.Errorf("make link to layer: %w", err)
			}
		}
		return errors.Join(s.WriteFile(path.Join(ownFolder, final, evidenceFile), proof),
			s.WriteFile(path.Join(ownFolder, final, "set.json"), raw))
	}
	return s.add(final, func(dst *os.Root) error {
		for name, to := range links {
			if err := dst.Symlink(to, name); err != nil {
				return fmt.Errorf("make link to layer: %w", err)
			}
		}
		return errors.Join(dst.WriteFile(evidenceFile, proof, 0o644), dst.WriteFile("set.json", raw, 0o644))
	})
}

// replaceByLink makes a link, and first removes a file or folder that has the link's name.
func (s *Store) replaceByLink(name, to string) error {
	if info, err := s.root.Lstat(name); err == nil && info.Mode().Type() != fs.ModeSymlink {
		if err := s.root.RemoveAll(name); err != nil {
			return err
		}
	}
	return s.point(name, to)
}

// links returns the links of a set into its layers, by name.
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
				return nil, fmt.Errorf("find the files of a layer: %w", err)
			}
			links[name] = path.Join("..", "..", "layers", layer, name)
		}
	}
	return links, nil
}

// LinksHold returns an error of kind Unverified if a link of a set does not lead into the set's layers.
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
			return fault.New(fault.Unverified,
				fmt.Sprintf("check installed driver: link %s leads to %q; want %q", name, to, links[name]),
				"repair the links: fetcher install")
		}
	}
	return nil
}

// Current returns the active set, or nil if there is none.
func (s *Store) Current() (*Set, error) { return s.pointed("current") }

// Previous returns the set that was active before the current one, or nil.
func (s *Store) Previous() (*Set, error) { return s.pointed("previous") }

func (s *Store) pointed(name string) (*Set, error) {
	to, err := s.link(name)
	if err != nil || to == "" {
		return nil, err
	}
	return s.readSet(to)
}

// Set returns the set with the artifact's digest, or nil if it is not staged.
func (s *Store) Set(digest string) (*Set, error) {
	name, err := hexOf(digest)
	if err != nil {
		return nil, err
	}
	return s.readSet(path.Join("sets", name))
}

// Sets returns all staged sets. It skips sets that cannot be read.
func (s *Store) Sets() ([]*Set, error) {
	entries, err := fs.ReadDir(s.root.FS(), path.Join(ownFolder, "sets"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list installed drivers: %w", err)
	}
	var all []*Set
	for _, e := range entries {
		if set, err := s.Set("sha256:" + e.Name()); err == nil && set != nil {
			all = append(all, set)
		}
	}
	return all, nil
}

// SetAt returns the set of a path in [Pointers], or nil if it no longer exists.
func (s *Store) SetAt(pointer string) (*Set, error) {
	digest, ok := strings.CutPrefix(pointer, "sets/")
	if !ok {
		return nil, fault.New(fault.Unverified,
			fmt.Sprintf("read installed driver: the path %.200q does not lead to a driver in this install folder", pointer),
			"remove the folder "+ownFolder+" in the install folder, then run: fetcher install")
	}
	return s.Set("sha256:" + digest)
}

// maxSet is the maximum size of set.json in bytes. A real file has a few kilobytes.
const maxSet = 1 << 20

// readSet reads the set at a path of [Pointers]. If set.json cannot be read, the result has only the digest. Such a set
// fits no node, so it is never loaded.
func (s *Store) readSet(to string) (*Set, error) {
	raw, err := s.readFile(path.Join(ownFolder, to, "set.json"), maxSet)
	if err == nil && raw == nil {
		return nil, nil
	}
	var set Set
	if err == nil && json.Unmarshal(raw, &set) == nil && set.Digest != "" {
		return &set, nil
	}
	return &Set{Digest: "sha256:" + path.Base(to), Damaged: true}, nil
}

// diskFault gives an error of a full disk its kind and a hint.
func diskFault(err error) error {
	return fault.Disk(err, "make space on the disk of the install folder, or set --install-dir to another folder")
}
