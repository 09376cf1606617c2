package snapshot_test

import (
	"encoding/json"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

// editSigned changes the part of a JSON file that is signed, and keeps the file's signatures, which are then invalid.
func editSigned(t testing.TB, data []byte, change func(signed map[string]any)) []byte {
	t.Helper()
	var m map[string]any
	check(t, json.Unmarshal(data, &m))
	change(m["signed"].(map[string]any))
	out, err := json.Marshal(m)
	check(t, err)
	return out
}

// futureVersion is a version of the timestamp above all versions that the node has seen.
var futureVersion = start.AddDate(0, 0, 1).Unix()

// forgeTimestamp writes a timestamp, signed with the farm's key, that is newer than all others. It names the given
// version of the snapshot.
func forgeTimestamp(t testing.TB, f *snapshots.Farm, dir string, snapshotVersion int64) {
	t.Helper()
	stamp := metadata.Timestamp(start.AddDate(0, 1, 0))
	stamp.Signed.Version, stamp.Signed.Meta["snapshot.json"] = futureVersion, &metadata.MetaFiles{Version: snapshotVersion}
	sign(t, stamp, f.Stamps, dir, "timestamp.json")
}

// forgeSnapshot writes version 9 of the snapshot, which names the given version of the targets. It has no hashes, so it
// would allow any file as the targets.
func forgeSnapshot(t testing.TB, key signature.Signer, dir string, targetsVersion int64) {
	t.Helper()
	snap := metadata.Snapshot(start.AddDate(0, 1, 0))
	snap.Signed.Version, snap.Signed.Meta["targets.json"] = 9, &metadata.MetaFiles{Version: targetsVersion}
	sign(t, snap, key, dir, "9.snapshot.json")
}

// TestAttacks checks attacks on a node that knows list 2. The node must refuse each with an error of its own, and keep
// its state. The attacker has every file that was ever published, and in some rows also keys.
func TestAttacks(t *testing.T) {
	t.Parallel()
	first := snapshots.New(t, start)
	publish(t, first, start, snapshot.Published)
	old := first.Copy(t)
	publish(t, first, start.Add(30*time.Minute), snapshot.Yanked)
	stranger := snapshots.New(t, start)
	publish(t, stranger, start, snapshot.Published)
	publish(t, stranger, start, snapshot.Published)
	publish(t, stranger, start, snapshot.Published)

	for name, row := range map[string]struct {
		// attack changes a copy of the newest folder, or returns another folder.
		attack func(t *testing.T, f *snapshots.Farm, dir string) string
		later  time.Duration
		want   error
	}{
		"rollback: all of an older list": {func(*testing.T, *snapshots.Farm, string) string { return old }, 0,
			snapshot.ErrRollback},
		"rollback: the snapshot, with the timestamp's key": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			forgeTimestamp(t, f, dir, 1)
			write(t, read(t, old, "1.snapshot.json"), dir, "1.snapshot.json")
			write(t, read(t, old, "1.targets.json"), dir, "1.targets.json")
			return dir
		}, 0, snapshot.ErrRollback},
		"rollback: the list, with the keys of timestamp and snapshot": {func(t *testing.T, f *snapshots.Farm,
			dir string) string {
			forgeSnapshot(t, f.Snapshot, dir, 1)
			forgeTimestamp(t, f, dir, 9)
			write(t, read(t, old, "1.targets.json"), dir, "1.targets.json")
			return dir
		}, 0, snapshot.ErrRollback},
		"freeze: the newest list for ever": {func(_ *testing.T, _ *snapshots.Farm, dir string) string { return dir },
			8 * 24 * time.Hour, snapshot.ErrExpired},
		"freeze: the root has expired": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			return dir
		}, 366 * 24 * time.Hour, snapshot.ErrExpired},
		"mix and match: the snapshot of another list": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, read(t, old, "1.snapshot.json"), dir, "3.snapshot.json")
			return dir
		}, 0, snapshot.ErrAltered},
		"mix and match: the targets of another list": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, read(t, old, "1.targets.json"), dir, "3.targets.json")
			return dir
		}, 0, snapshot.ErrAltered},
		"mix and match: the file of another list": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, read(t, list(t, old, 1)), list(t, dir, 3))
			return dir
		}, 0, snapshot.ErrAltered},
		"a byte of the list": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			data := read(t, list(t, dir, 3))
			data[len(data)/2] ^= 1
			write(t, data, list(t, dir, 3))
			return dir
		}, 0, snapshot.ErrAltered},
		"a list that is too short": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, read(t, list(t, dir, 3))[:20], list(t, dir, 3))
			return dir
		}, 0, snapshot.ErrAltered},
		"a list that is too long": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, append(read(t, list(t, dir, 3)), 0), list(t, dir, 3))
			return dir
		}, 0, snapshot.ErrEndless},
		"another length in the targets": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			write(t, editSigned(t, read(t, dir, "3.targets.json"), func(s map[string]any) {
				s["targets"].(map[string]any)[snapshot.Name].(map[string]any)["length"] = 1
			}), dir, "3.targets.json")
			return dir
		}, 0, snapshot.ErrAltered},
		"a timestamp that lives longer": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, editSigned(t, read(t, dir, "timestamp.json"), func(s map[string]any) {
				s["expires"] = "2036-01-01T00:00:00Z"
			}),
				dir, "timestamp.json")
			return dir
		}, 0, snapshot.ErrSignature},
		"wrong key: the timestamp": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			sign(t, metadata.Timestamp(start.AddDate(0, 1, 0)), snapshots.NewSigner(t), dir, "timestamp.json")
			return dir
		}, 0, snapshot.ErrSignature},
		"wrong key: the snapshot, signed with the key for lists": {func(t *testing.T, f *snapshots.Farm,
			dir string) string {
			forgeSnapshot(t, f.Targets, dir, 3)
			forgeTimestamp(t, f, dir, 9)
			return dir
		}, 0, snapshot.ErrSignature},
		"wrong key: somebody else's snapshot": {func(*testing.T, *snapshots.Farm, string) string { return stranger.Dir }, 0,
			snapshot.ErrSignature},
		"threshold: a root that one of two signed": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			root, err := metadata.Root().FromBytes(read(t, dir, "1.root.json"))
			check(t, err)
			root.Signed.Version, root.Signatures = 2, nil
			sign(t, root, f.Root[0], dir, "2.root.json")
			return dir
		}, 0, snapshot.ErrSignature},
		"threshold: one key signs twice": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			root, err := metadata.Root().FromBytes(read(t, dir, "1.root.json"))
			check(t, err)
			root.Signed.Version, root.Signatures = 2, nil
			_, err = root.Sign(f.Root[0])
			check(t, err)
			again := root.Signatures[0]
			again.KeyID = root.Signed.Roles["root"].KeyIDs[1]
			root.Signatures = append(root.Signatures, again)
			text, err := root.ToBytes(true)
			check(t, err)
			write(t, text, dir, "2.root.json")
			return dir
		}, 0, snapshot.ErrSignature},
		"a root that skips one": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			root, err := metadata.Root().FromBytes(read(t, dir, "1.root.json"))
			check(t, err)
			root.Signed.Version, root.Signatures = 3, nil
			_, err = root.Sign(f.Root[0])
			check(t, err)
			sign(t, root, f.Root[1], dir, "2.root.json")
			return dir
		}, 0, snapshot.ErrRollback},
		"a root for a timestamp": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, read(t, dir, "1.root.json"), dir, "timestamp.json")
			return dir
		}, 0, snapshot.ErrMalformed},
		"targets that are null": {func(t *testing.T, f *snapshots.Farm, dir string) string {
			forgeSnapshot(t, f.Snapshot, dir, 9)
			forgeTimestamp(t, f, dir, 9)
			write(t, []byte(`{"signed":{"_type":"targets","version":9,"targets":{"x":null}},"signatures":[]}`), dir,
				"9.targets.json")
			return dir
		}, 0, snapshot.ErrMalformed},
		"no JSON": {func(t *testing.T, _ *snapshots.Farm, dir string) string {
			write(t, []byte("<html>log in first</html>"), dir, "timestamp.json")
			return dir
		}, 0, snapshot.ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, first)
			if _, err := n.client(t, first.Dir).Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := read(t, n.state)
			newest := first.Copy(t)
			ahead := &snapshots.Farm{Dir: newest, Root: first.Root, Targets: first.Targets, Snapshot: first.Snapshot,
				Stamps: first.Stamps}
			if row.later == 0 { // a third list, which the node has not seen
				publish(t, ahead, start.Add(40*time.Minute), snapshot.Yanked)
			}
			n.now = n.now.Add(row.later)
			dir := row.attack(t, ahead, newest)
			for kind, from := range map[string]string{"folder": dir, "web server": serve(t, dir)} {
				s, err := n.client(t, from).Refresh(t.Context())
				if !errors.Is(err, row.want) || !fault.Is(err, fault.Unverified) || fault.Hint(err) == "" {
					t.Errorf("Refresh from a %s = %v, %v (%v, hint %q); want %v", kind, s, err, fault.Of(err), fault.Hint(err),
						row.want)
				}
				if got := read(t, n.state); string(got) != string(before) {
					t.Errorf("the state of the node changed")
				}
				if last, err := n.client(t, from).Last(); err != nil || last.Version != 2 {
					t.Errorf("Last = %+v, %v; want list 2", last, err)
				}
			}
		})
	}
}

// list returns the path of the file with the list of the given version.
func list(t testing.TB, dir string, version int) string {
	t.Helper()
	targets, err := metadata.Targets().FromBytes(read(t, dir, string(rune('0'+version))+".targets.json"))
	check(t, err)
	return filepath.Join(dir, "targets", targets.Signed.Targets[snapshot.Name].Hashes["sha256"].String()+"."+snapshot.Name)
}

func sign[T metadata.Roles](t testing.TB, m *metadata.Metadata[T], by signature.Signer, parts ...string) {
	t.Helper()
	_, err := m.Sign(by)
	check(t, err)
	text, err := m.ToBytes(true)
	check(t, err)
	write(t, text, parts...)
}
