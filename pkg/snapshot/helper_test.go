package snapshot_test

import (
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

func packed(t testing.TB, text string) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	check(t, err)
	return enc.EncodeAll([]byte(text), nil)
}

// FuzzVerify checks that Verify does not panic, and that it accepts only lists of the known format that expire. The
// root is a part of the input, because the farm has new keys in each run.
func FuzzVerify(f *testing.F) {
	farm := snapshots.New(f, start)
	publish(f, farm, start, snapshot.Yanked)
	root := read(f, farm.Dir, "1.root.json")
	stamp, snap := read(f, farm.Dir, "timestamp.json"), read(f, farm.Dir, "1.snapshot.json")
	targets, file := read(f, farm.Dir, "1.targets.json"), read(f, list(f, farm.Dir, 1))
	f.Add(root, stamp, snap, targets, file)
	f.Add(root, []byte(`{"signed":{"_type":"timestamp","meta":{}},"signatures":[]}`), snap,
		[]byte(`{"signed":{"_type":"targets","targets":{"x":null}}}`), file)
	f.Fuzz(func(t *testing.T, root, stamp, snap, targets, file []byte) {
		s, err := snapshot.Verify(snapshot.Files{Root: root, Timestamp: stamp, Snapshot: snap, Targets: targets,
			Catalogue: file})
		if err == nil && (s.Check() != nil || s.Expires.IsZero()) {
			t.Errorf("Verify took %+v", s)
		}
	})
}
