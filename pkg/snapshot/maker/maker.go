// Package maker writes snapshots: a folder for any web server, in the layout of TUF with consistent snapshots. The
// caller passes the signers; the package stores no private key. It never publishes a list that a client would refuse.
// It overwrites no file except timestamp.json.
package maker

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/gofrs/flock"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
)

// Repository is the folder of a snapshot. A lock ensures that only one process writes to it.
type Repository struct {
	dir  string
	now  func() time.Time
	lock *flock.Flock
}

// Open opens a folder, and makes it if it is missing. Timestamps get their versions from the given clock. The caller
// closes the repository.
func Open(dir string, now func() time.Time) (*Repository, error) {
	fail := func(err error) (*Repository, error) {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("open snapshot %s: %w", dir, err),
			"give a folder in which this user may write",
		)
	}
	if err := os.MkdirAll(filepath.Join(dir, "targets"), 0o755); err != nil {
		return fail(err)
	}
	lock := flock.New(filepath.Join(dir, ".lock"))
	locked, err := lock.TryLock()
	if err != nil {
		return fail(err)
	}
	if !locked {
		return nil, fault.New(fault.Busy, "open snapshot "+dir+": another process writes to this folder",
			"wait until the other process is done")
	}
	return &Repository{dir, now, lock}, nil
}

// Close releases the lock, so that other processes may write.
func (r *Repository) Close() error { return r.lock.Close() }

// Root says which keys sign a snapshot from now on.
type Root struct {
	// Keys are the keys that may sign the next root. Threshold is how many of them must sign it.
	Keys      []crypto.PublicKey
	Threshold int
	// Targets is the key that signs the content of a list. Snapshot is the key that signs which list is the newest.
	// Timestamp is the key that signs, again and again, that this list is still the newest.
	Targets, Snapshot, Timestamp crypto.PublicKey
	// Signers sign the new root. Among them must be signers for Threshold of the Keys. If there is a former root, there
	// must also be signers for as many of its keys as its threshold says.
	Signers []signature.Signer
	// Expires is the time after which clients refuse the root.
	Expires time.Time
}

// WriteRoot writes the root metadata of the next version, which is 1 in a new folder, and returns the file's path.
func (r *Repository) WriteRoot(next Root) (string, error) {
	name, err := r.writeRoot(next)
	if err != nil {
		return "", fmt.Errorf("write root metadata of snapshot: %w", err)
	}
	return name, nil
}

func (r *Repository) writeRoot(next Root) (string, error) {
	if next.Threshold < 1 || next.Threshold > len(next.Keys) {
		return "", fault.New(
			fault.Usage,
			fmt.Sprintf("the threshold is %d, but there are %d root keys", next.Threshold, len(next.Keys)),
			"give --threshold a number from 1 to the number of root keys",
		)
	}
	root := metadata.Root(tufTime(next.Expires))
	root.Signed.Roles[metadata.ROOT].Threshold = next.Threshold
	for role, keys := range map[string][]crypto.PublicKey{
		metadata.ROOT: next.Keys, metadata.TARGETS: {next.Targets}, metadata.SNAPSHOT: {next.Snapshot},
		metadata.TIMESTAMP: {next.Timestamp},
	} {
		for _, pub := range keys {
			key, err := keyOf(pub)
			if err != nil {
				return "", err
			}
			if err := root.Signed.AddKey(key, role); err != nil {
				return "", err
			}
		}
	}
	if len(root.Signed.Roles[metadata.ROOT].KeyIDs) != len(next.Keys) {
		return "", fault.New(fault.Usage, "a root key is given twice", "give each --root-key once")
	}
	former, err := r.newestRoot()
	if err != nil {
		return "", err
	}
	if former != nil {
		root.Signed.Version = former.Signed.Version + 1
	}
	for _, s := range next.Signers {
		sig, err := root.Sign(s)
		if err != nil {
			return "", err
		}
		if slices.ContainsFunc(
			root.Signatures[:len(root.Signatures)-1],
			func(other metadata.Signature) bool { return other.KeyID == sig.KeyID },
		) {
			root.Signatures = root.Signatures[:len(root.Signatures)-1] // a key signs only once
		}
	}
	few := func(whose string, err error) error {
		return fault.Wrap(
			fault.Usage,
			fmt.Errorf("the new root is signed by too few keys of the %s root: %w", whose, err),
			"give more private keys of the "+whose+" root: with --root-key if the new root lists the key, else with "+
				"--former-key",
		)
	}
	if former != nil {
		if err := former.VerifyDelegate(metadata.ROOT, root); err != nil {
			return "", few("former", err)
		}
	}
	if err := root.VerifyDelegate(metadata.ROOT, root); err != nil {
		return "", few("new", err)
	}
	text, err := root.ToBytes(true)
	if err != nil {
		return "", err
	}
	name := rootName(root.Signed.Version)
	return filepath.Join(r.dir, name), r.write(name, text)
}

func rootName(version int64) string { return strconv.FormatInt(version, 10) + ".root.json" }

// newestRoot reads the newest root; nil means that there is none.
func (r *Repository) newestRoot() (*metadata.Metadata[metadata.RootType], error) {
	var newest *metadata.Metadata[metadata.RootType]
	for version := int64(1); ; version++ {
		text, err := r.read(rootName(version))
		if errors.Is(err, fs.ErrNotExist) {
			return newest, nil
		}
		if err != nil {
			return nil, err
		}
		if newest, err = metadata.Root().FromBytes(text); err != nil {
			return nil, fmt.Errorf("read %s: %w", rootName(version), err)
		}
	}
}

// keyOf converts a public key. It accepts only ECDSA P-256, which every TUF client and every KMS supports.
func keyOf(pub crypto.PublicKey) (*metadata.Key, error) {
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fault.New(
			fault.Usage,
			fmt.Sprintf("key of type %T: want an ECDSA key on the curve P-256", pub),
			"make such a key: builder keygen FILE",
		)
	}
	return metadata.KeyFromPublicKey(key)
}

// tufTime rounds a time down to seconds in UTC, as TUF writes it.
func tufTime(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

// Signer signs with one key. The key may be in a file or in a KMS.
type Signer = signature.Signer

// Signers are the keys that sign the three parts of a list.
type Signers struct{ Targets, Snapshot, Timestamp Signer }

// Until has the times at which the three parts of a snapshot expire.
type Until struct{ Targets, Snapshot, Timestamp time.Time }

// Publish writes a list and makes it the newest. least is the lowest permitted version of the list and its timestamp.
// If least is 0, the list gets the version after the newest list in the folder.
func (r *Repository) Publish(
	list snapshot.Catalogue,
	by Signers,
	until Until,
	least int64,
) (*snapshot.Snapshot, error) {
	s, err := r.publish(list, by, until, least)
	if err != nil {
		return nil, fmt.Errorf("publish snapshot: %w", err)
	}
	return s, nil
}

func (r *Repository) publish(
	list snapshot.Catalogue,
	by Signers,
	until Until,
	least int64,
) (*snapshot.Snapshot, error) {
	root, err := r.newestRoot()
	if err != nil {
		return nil, err
	}
	if root == nil {
		return nil, fault.New(fault.Usage, "the folder has no root metadata yet", "make a root: builder snapshot root")
	}
	former, err := r.readPublished()
	if err != nil {
		return nil, err
	}
	version := max(former.version+1, least)
	for r.hasVersion(version) { // skips a version of a run that ended before it replaced timestamp.json
		version++
	}
	file, err := Encode(list)
	if err != nil {
		return nil, err
	}
	info, err := metadata.TargetFile().FromBytes(snapshot.Name, file, "sha256")
	if err != nil {
		return nil, err
	}
	targets := metadata.Targets(tufTime(until.Targets))
	targets.Signed.Version, targets.Signed.Targets[snapshot.Name] = version, info
	files := snapshot.Files{Catalogue: file}
	if files.Targets, err = signMetadata(targets, by.Targets); err != nil {
		return nil, err
	}
	snap := metadata.Snapshot(tufTime(until.Snapshot))
	snap.Signed.Version = version
	if snap.Signed.Meta["targets.json"], err = metaOf(files.Targets, version); err != nil {
		return nil, err
	}
	if files.Snapshot, err = signMetadata(snap, by.Snapshot); err != nil {
		return nil, err
	}
	stamp := metadata.Timestamp(tufTime(until.Timestamp))
	stamp.Signed.Version = max(r.nextStamp(former), least)
	if stamp.Signed.Meta["snapshot.json"], err = metaOf(files.Snapshot, version); err != nil {
		return nil, err
	}
	if files.Timestamp, err = signMetadata(stamp, by.Timestamp); err != nil {
		return nil, err
	}
	s, err := r.checkFiles(files, root.Signed.Version)
	if err != nil {
		return nil, err
	}
	// The timestamp is written last, so that a reader sees either the former list or the new list.
	v := strconv.FormatInt(version, 10)
	for _, f := range []struct {
		name string
		data []byte
	}{{filepath.Join("targets", info.Hashes["sha256"].String()+"."+snapshot.Name), file},
		{v + ".targets.json", files.Targets}, {v + ".snapshot.json", files.Snapshot}} {
		if err := r.write(f.name, f.data); err != nil {
			return nil, err
		}
	}
	if err := r.writeAtomic("timestamp.json", files.Timestamp); err != nil {
		return nil, err
	}
	return s, r.trim(version)
}

// Refresh signs a new timestamp, which says that the published list is still the newest.
func (r *Repository) Refresh(by signature.Signer, until time.Time) (*snapshot.Snapshot, error) {
	s, err := r.refresh(by, until)
	if err != nil {
		return nil, fmt.Errorf("refresh snapshot: %w", err)
	}
	return s, nil
}

func (r *Repository) refresh(by signature.Signer, until time.Time) (*snapshot.Snapshot, error) {
	root, err := r.newestRoot()
	if err != nil {
		return nil, err
	}
	at, err := r.readPublished()
	if err != nil {
		return nil, err
	}
	if root == nil || at.version == 0 {
		return nil, fault.New(fault.Usage, "the folder has no snapshot yet", "make a snapshot: builder snapshot make")
	}
	stamp := metadata.Timestamp(tufTime(until))
	stamp.Signed.Version, stamp.Signed.Meta["snapshot.json"] = r.nextStamp(at), at.meta
	files := at.files
	if files.Timestamp, err = signMetadata(stamp, by); err != nil {
		return nil, err
	}
	s, err := r.checkFiles(files, root.Signed.Version)
	if err != nil {
		return nil, err
	}
	return s, r.writeAtomic("timestamp.json", files.Timestamp)
}

// checkFiles checks that clients will accept the files before they are published.
func (r *Repository) checkFiles(files snapshot.Files, root int64) (_ *snapshot.Snapshot, err error) {
	if files.Root, err = r.read(rootName(root)); err != nil {
		return nil, err
	}
	s, err := snapshot.Verify(files)
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			err,
			"sign with the keys that the newest root lists; to use other keys, make a root first: builder snapshot root",
		)
	}
	return s, nil
}

func metaOf(data []byte, version int64) (*metadata.MetaFiles, error) {
	f, err := metadata.TargetFile().FromBytes("", data, "sha256")
	if err != nil {
		return nil, err
	}
	return &metadata.MetaFiles{Version: version, Length: f.Length, Hashes: f.Hashes}, nil
}

func signMetadata[T metadata.Roles](m *metadata.Metadata[T], by signature.Signer) ([]byte, error) {
	if _, err := m.Sign(by); err != nil {
		return nil, err
	}
	return m.ToBytes(true)
}

// publishedList is the newest list, with its version and the version of its timestamp.
type publishedList struct {
	version, stamp int64
	meta           *metadata.MetaFiles // of the snapshot metadata
	files          snapshot.Files      // all parts but the root
}

// nextStamp returns the version of the next timestamp: the clock in seconds, or one more than the former version if
// that is higher. So even after the loss of the folder, nodes have seen only lower versions.
func (r *Repository) nextStamp(former publishedList) int64 {
	return max(former.stamp+1, r.now().Unix())
}

// readPublished reads the published list. If no list is published, the version is 0.
func (r *Repository) readPublished() (at publishedList, err error) {
	if at.files.Timestamp, err = r.read("timestamp.json"); errors.Is(err, fs.ErrNotExist) {
		return publishedList{}, nil
	} else if err != nil {
		return at, err
	}
	stamp, err := metadata.Timestamp().FromBytes(at.files.Timestamp)
	if err != nil {
		return at, fmt.Errorf("read timestamp.json: %w", err)
	}
	if at.stamp, at.meta = stamp.Signed.Version, stamp.Signed.Meta["snapshot.json"]; at.meta == nil {
		return at, errors.New("read timestamp.json: the file has no entry for snapshot.json")
	}
	at.version = at.meta.Version
	v := strconv.FormatInt(at.version, 10)
	if at.files.Snapshot, err = r.read(v + ".snapshot.json"); err != nil {
		return at, err
	}
	if at.files.Targets, err = r.read(v + ".targets.json"); err != nil {
		return at, err
	}
	targets, err := metadata.Targets().FromBytes(at.files.Targets)
	if err != nil {
		return at, fmt.Errorf("read the list of targets: %w", err)
	}
	info := targets.Signed.Targets[snapshot.Name]
	if info == nil {
		return at, errors.New("read the list of targets: the list has no entry for the file " + snapshot.Name)
	}
	at.files.Catalogue, err = r.read(filepath.Join("targets", info.Hashes["sha256"].String()+"."+snapshot.Name))
	return at, err
}

// hasVersion reports whether the folder has files of a version.
func (r *Repository) hasVersion(version int64) bool {
	v := strconv.FormatInt(version, 10)
	for _, role := range []string{"targets", "snapshot"} {
		if _, err := os.Lstat(filepath.Join(r.dir, v+"."+role+".json")); err == nil {
			return true
		}
	}
	return false
}

func (r *Repository) read(name string) ([]byte, error) {
	return os.ReadFile(filepath.Join(r.dir, name))
}

// write writes a file that never changes afterwards. If the file exists with the same bytes, write does nothing.
func (r *Repository) write(name string, data []byte) error {
	if have, err := r.read(name); err == nil {
		if string(have) == string(data) {
			return nil
		}
		return fault.New(fault.PublishRefused, fmt.Sprintf("write %s: the file exists already, with other content", name), "")
	}
	return r.writeAtomic(name, data)
}

// writeAtomic writes a file atomically.
func (r *Repository) writeAtomic(name string, data []byte) (err error) {
	path := filepath.Join(r.dir, name)
	defer func() {
		err = fault.Disk(err, "free space on the disk of the snapshot's folder")
	}()
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// keptVersions is the number of older lists that stay in the folder, for clients that still read them.
const keptVersions = 3

// trim removes the files of lists that are more than keptVersions older than the newest version.
func (r *Repository) trim(version int64) error {
	used := map[string]bool{}
	names, err := filepath.Glob(filepath.Join(r.dir, "*.targets.json"))
	if err != nil {
		return err
	}
	var old []string
	for _, path := range names {
		var v int64
		if _, err := fmt.Sscanf(filepath.Base(path), "%d.targets.json", &v); err != nil {
			continue
		}
		if v < version-keptVersions {
			old = append(old, path, filepath.Join(r.dir, strconv.FormatInt(v, 10)+".snapshot.json"))
			continue
		}
		var m struct {
			Signed struct {
				Targets map[string]struct{ Hashes map[string]string } `json:"targets"`
			} `json:"signed"`
		}
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, &m)
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		used[m.Signed.Targets[snapshot.Name].Hashes["sha256"]+"."+snapshot.Name] = true
	}
	lists, err := filepath.Glob(filepath.Join(r.dir, "targets", "*."+snapshot.Name))
	if err != nil {
		return err
	}
	for _, path := range lists {
		if !used[filepath.Base(path)] {
			old = append(old, path)
		}
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
