package agent_test

import (
	"context"
	"io"
	"strings"
	"syscall"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// TestTooLittleSpace checks that the agent fetches nothing, and keeps the active driver, if the new driver does not fit
// on the disk.
func TestTooLittleSpace(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	fetched := 0
	n.parts.Open = func(ref string) (agent.Repository, error) {
		repo, err := registry.Open(ref, registry.Options{})
		return blobs{repo, func(_ string, rc io.ReadCloser) io.ReadCloser { fetched++; return rc }}, err
	}
	var most int64
	for _, l := range pn.Layers {
		most += l.Size * 5 / 2
	}
	most += 64 << 20
	for _, free := range []int64{0, most / 2, most - 1, most} {
		n.parts.Free = func() (int64, error) { return free, nil }
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if free == most {
			if err != nil || r.Verdict.Digest != pn.Digest {
				t.Errorf("%d bytes free: Run = %s, %v; want the new driver", free, r.Verdict.Digest, err)
			}
			continue
		}
		if !fault.Is(err, fault.DiskFull) || !strings.Contains(err.Error(), "less is free") || fault.Hint(err) == "" ||
			fetched > 0 || r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready {
			t.Errorf("%d bytes free: Run = %s, %v after %d layers; want disk full, nothing fetched, the active driver", free,
				r.Verdict.Digest, err, fetched)
		}
	}
}

// TestLittleSpaceWithoutDriver checks a node without a driver whose disk seems to be too small. The node must try the
// fetch, because the needed space is only an estimate.
func TestLittleSpaceWithoutDriver(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	n.parts.Free = func() (int64, error) { return 0, nil }
	if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("Run = %+v, %v; want the driver", r.Verdict, err)
	}
}

// TestLittleSpaceWithDamagedDriver checks a node whose installed driver is damaged and whose disk seems to be too
// small. While the driver is loaded, the node must keep it and fetch nothing. After a reboot, no driver is loaded, so
// the node must try the fetch.
func TestLittleSpaceWithDamagedDriver(t *testing.T) {
	t.Parallel()
	n, ref, c, p := bare(t)
	if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
		t.Fatal(err)
	}
	n.edit(t, "layers/*/drivers/nvidia.ko", flipped)
	n.parts.Free = func() (int64, error) { return 0, nil }
	if r, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.DiskFull) || r.Verdict.State != gpucheck.Ready {
		t.Errorf("loaded: Run = %s, %v; want ready, and disk full", r.Verdict.State, err)
	}
	n.reboot(t)
	if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Errorf("not loaded: Run = %s, %v; want the driver", r.Verdict.State, err)
	}
}

// TestDiskFullText checks that the text of the error does not change with the free space. For each new text, the
// cluster gets another Event.
func TestDiskFullText(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, _, pn := publishTwo(t, 1)
	var texts []string
	for free := range int64(2) {
		n.parts.Free = func() (int64, error) { return free << 20, nil }
		_, err := n.run(t, ref, pn.Digest, newer.Driver)
		texts = append(texts, err.Error())
	}
	if texts[0] != texts[1] {
		t.Errorf("the texts of two runs differ:\n%s\n%s", texts[0], texts[1])
	}
}

// blobs is a repository whose layers are read through the function change.
type blobs struct {
	agent.Repository
	change func(digest string, rc io.ReadCloser) io.ReadCloser
}

func (b blobs) Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error) {
	rc, err := b.Repository.Blob(ctx, digest, size)
	if err != nil {
		return nil, err
	}
	return b.change(digest, rc), nil
}

// closing is a stream that calls done when it is closed.
type closing struct {
	io.ReadCloser
	done func()
}

func (c closing) Close() error {
	defer c.done()
	return c.ReadCloser.Close()
}

// full is a stream that fails like a write to a full disk. Before that, it calls wait.
type full struct {
	io.ReadCloser
	wait func()
}

func (f full) Read([]byte) (int, error) {
	f.wait()
	return 0, syscall.ENOSPC
}

// TestLayersOutliveFullDisk lets the disk become full while the last layer is written. The complete layers must stay on
// the disk, so that the next run fetches only the last one.
func TestLayersOutliveFullDisk(t *testing.T) {
	t.Parallel()
	n, ref, _, newer, po, pn := publishTwo(t, 1)
	last := pn.Layers[len(pn.Layers)-1]
	others := make(chan struct{}, len(pn.Layers))
	open := n.parts.Open
	n.parts.Open = func(ref string) (agent.Repository, error) {
		repo, err := open(ref)
		return blobs{repo, func(digest string, rc io.ReadCloser) io.ReadCloser {
			if digest != last.Digest {
				return closing{rc, func() { others <- struct{}{} }}
			}
			return full{rc, func() {
				for range len(pn.Layers) - 1 {
					<-others
				}
			}}
		}}, err
	}
	if r, err := n.run(t, ref, pn.Digest, newer.Driver); !fault.Is(err, fault.DiskFull) || r.Verdict.Digest != po.Digest {
		t.Fatalf("Run = %s, %v; want disk full, and the active driver", r.Verdict.Digest, err)
	}
	n.parts.Open = open
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if err != nil || r.FetchedBytes != last.Size || r.Verdict.Digest != pn.Digest {
		t.Errorf("then: Run = %s, %v, fetched %d bytes; want the new driver, and only the layer of %d bytes",
			r.Verdict.Digest, err, r.FetchedBytes, last.Size)
	}
}
