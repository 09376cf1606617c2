package snapshot_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	foreign "github.com/theupdateframework/go-tuf/client"

	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/testkit/snapshots"
)

// bytesOf is a buffer. The other client writes a downloaded file into it.
type bytesOf struct{ bytes.Buffer }

func (b *bytesOf) Delete() error { b.Reset(); return nil }

// TestForeignClient reads the folder with another TUF client, go-tuf 0.7. It has no code in common with the library
// that writes the folder, except the encoder of canonical JSON.
func TestForeignClient(t *testing.T) {
	t.Parallel()
	now := time.Now().UTC() // this client always uses the system's clock
	f := snapshots.New(t, now)
	publish(t, f, now, snapshot.Yanked)
	store, err := foreign.HTTPRemoteStore(serve(t, f.Dir), nil, nil)
	check(t, err)
	c := foreign.NewClient(foreign.MemoryLocalStore(), store)
	check(t, c.Init(read(t, f.Dir, "1.root.json")))
	files, err := c.Update()
	if err != nil {
		t.Fatalf("Update = %v", err)
	}
	if len(files) != 1 || files[snapshot.Name].Length == 0 {
		t.Errorf("Update = %+v; want %s", files, snapshot.Name)
	}
	var got bytesOf
	check(t, c.Download(snapshot.Name, &got))
	if want := read(t, list(t, f.Dir, 1)); !bytes.Equal(got.Bytes(), want) {
		t.Errorf("Download has %d bytes; want the %d of the list", got.Len(), len(want))
	}
	// The other client must refuse a changed timestamp. Its format is valid, so only its signature can be the reason.
	check(t, os.WriteFile(filepath.Join(f.Dir, "timestamp.json"),
		editSigned(t, read(t, f.Dir, "timestamp.json"), func(s map[string]any) { s["version"] = now.Unix() + 8 }), 0o644))
	if _, err := c.Update(); err == nil {
		t.Error("Update of a changed timestamp = nil; want an error")
	}
}
