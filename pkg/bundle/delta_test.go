package bundle

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// noise returns random bytes, which do not compress.
func noise(seed uint64, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b) // Read never fails
	return b
}

// insert returns a copy of b with the bytes of more at position at.
func insert(b []byte, at int, more []byte) []byte { return slices.Insert(slices.Clone(b), at, more...) }

func makeDelta(t testing.TB, from, to []byte) []byte {
	t.Helper()
	var w bytes.Buffer
	if err := WriteDelta(t.Context(), bytes.NewReader(from), bytes.NewReader(to), &w); err != nil {
		t.Fatal(err)
	}
	return w.Bytes()
}

// applyDelta applies a delta to from and returns the result.
func applyDelta(delta, from []byte) ([]byte, error) {
	return io.ReadAll(&deltaReader{r: bytes.NewReader(delta), win: &window{r: bytes.NewReader(from)}})
}

// deltaCases returns pairs of byte streams, and the maximum size in bytes of each pair's delta.
func deltaCases() map[string]struct {
	from, to []byte
	most     int
} {
	long := noise(1, 7<<20)
	return map[string]struct {
		from, to []byte
		most     int
	}{
		"equal":                   {long, long, 2000},
		"something grows":         {long, insert(long, 3<<20, noise(2, 4096)), 8000},
		"something shrinks":       {long, slices.Delete(slices.Clone(long), 1<<20, 1<<20+5000), 4000},
		"as much as the margin":   {long, insert(long, 100, noise(3, deltaMargin)), deltaMargin + 200_000},
		"nothing before":          {nil, long[:3<<20], 3<<20 + 1000},
		"little before":           {[]byte("x"), long[:3<<20], 3<<20 + 1000},
		"all is new":              {noise(4, 5<<20), long, 7<<20 + 2000},
		"much longer than before": {long[:1<<20], slices.Concat(long[:1<<20], noise(5, 6<<20)), 6<<20 + 20_000},
		"much shorter":            {long, long[:1000], 200},
		"one chunk":               {long, long[:deltaChunk], 300},
		"one byte more":           {long, long[:deltaChunk+1], 350},
		"nothing":                 {long, nil, 0},
	}
}

func TestDelta(t *testing.T) {
	t.Parallel()
	for name, tc := range deltaCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			delta := makeDelta(t, tc.from, tc.to)
			if len(delta) > tc.most {
				t.Errorf("WriteDelta = %d bytes; want at most %d", len(delta), tc.most)
			}
			if again := makeDelta(t, tc.from, tc.to); len(delta) < 10_000 && !bytes.Equal(again, delta) {
				t.Error("WriteDelta = other bytes for equal input")
			}
			got, err := applyDelta(delta, tc.from)
			if err != nil || !bytes.Equal(got, tc.to) {
				t.Errorf("the delta makes %d bytes, %v; want those %d", len(got), err, len(tc.to))
			}
		})
	}
}

// TestDeltaByZstd checks that the program zstd reads the frames of [WriteDelta], and that [UnpackDelta] reads frames of
// zstd.
func TestDeltaByZstd(t *testing.T) {
	t.Parallel()
	zstd := installed.Program(t, "zstd")
	dir := t.TempDir()
	run := func(in []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), zstd, append([]string{"-q", "-c"}, args...)...)
		var stderr strings.Builder
		cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("zstd %q: %v: %s", args, err, stderr.String())
		}
		return out
	}
	for name, tc := range deltaCases() {
		if len(tc.from) < 100 {
			continue // zstd's --patch-from needs a file that is not almost empty
		}
		var theirs bytes.Buffer
		frames, i := makeDelta(t, tc.from, tc.to), 0
		for to := range slices.Chunk(tc.to, deltaChunk) {
			// The test computes the dictionary from the definition of the format. It does not use [window], which it checks.
			end := min(len(tc.from), (i+1)*deltaChunk+deltaMargin)
			dict := filepath.Join(dir, "dict")
			if err := os.WriteFile(dict, tc.from[max(0, end-deltaChunk-2*deltaMargin):end], 0o600); err != nil {
				t.Fatal(err)
			}
			n := binary.LittleEndian.Uint32(frames)
			if got := run(frames[4:4+n], "-d", "--long=27", "--patch-from="+dict); !bytes.Equal(got, to) {
				t.Errorf("%s: zstd makes %d bytes of frame %d; want those %d", name, len(got), i, len(to))
			}
			frames = frames[4+n:]
			raw := filepath.Join(dir, "chunk")
			if err := os.WriteFile(raw, to, 0o600); err != nil {
				t.Fatal(err)
			}
			frame := run(nil, "-3", "--long=23", "--patch-from="+dict, raw)
			theirs.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(frame)))) //nolint:gosec // some bytes
			theirs.Write(frame)
			i++
		}
		if len(frames) > 0 {
			t.Errorf("%s: %d bytes of the delta are left", name, len(frames))
		}
		if got, err := applyDelta(theirs.Bytes(), tc.from); err != nil || !bytes.Equal(got, tc.to) {
			t.Errorf("%s: the frames of zstd give %d bytes, %v; want the %d original bytes", name, len(got), err, len(tc.to))
		}
	}
}

// layerPair returns two packed layers, and the first one also unpacked.
func layerPair(t *testing.T) (former *os.Root, from, to Layer) {
	t.Helper()
	module := string(noise(6, 3<<20))
	from = pack(t, LayerModules, map[string]string{"drivers/nvidia.ko": module, "drivers/nvidia-uvm.ko": "uvm"})
	to = pack(
		t,
		LayerModules,
		map[string]string{
			"drivers/nvidia.ko":     module[:1<<20] + "new" + module[1<<20:],
			"drivers/nvidia-drm.ko": "drm",
			"drivers/nvidia-uvm.ko": "uvm 2",
		},
	)
	dir, err := unpackFile(t, from)
	if err != nil {
		t.Fatal(err)
	}
	former, err = os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { former.Close() })
	return former, from, to
}

func plainOf(t *testing.T, l Layer) []byte {
	t.Helper()
	f, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := OpenArchive(f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	raw, err := io.ReadAll(r)
	if err != nil || sum(raw) != l.DiffID {
		t.Fatalf("OpenArchive = %s, %v; want %s", sum(raw), err, l.DiffID)
	}
	return raw
}

func TestUnpackDelta(t *testing.T) {
	t.Parallel()
	former, from, to := layerPair(t)
	delta := makeDelta(t, plainOf(t, from), plainOf(t, to))
	if len(delta) > 4000 {
		t.Errorf("the delta has %d bytes", len(delta))
	}
	apply := func(t *testing.T, delta []byte, digest string, former *os.Root, diffID string) (string, error) {
		dir := t.TempDir()
		dst, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer dst.Close()
		archive := TreeArchive(t.Context(), former, LayerModules, nil)
		defer archive.Close()
		return dir, UnpackDelta(t.Context(), bytes.NewReader(delta), digest, int64(len(delta)), archive, diffID, dst)
	}
	dir, err := apply(t, delta, sum(delta), former, to.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := CheckTree(t.Context(), root, LayerModules, to.DiffID, nil); err != nil {
		t.Error(err)
	}

	other, err := os.OpenRoot(tree(t, map[string]string{"drivers/nvidia.ko": "what somebody changed"}))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	flipped := slices.Clone(delta)
	flipped[len(flipped)/2] ^= 1
	for name, err := range map[string]error{
		"a byte of the delta changed on the way": second(apply(t, flipped, sum(delta), former, to.DiffID)),
		"a byte changed before it was digested":  second(apply(t, flipped, sum(flipped), former, to.DiffID)),
		"the former layer was changed":           second(apply(t, delta, sum(delta), other, to.DiffID)),
		"the wanted diff ID is another":          second(apply(t, delta, sum(delta), former, from.DiffID)),
		"the delta ends early": second(apply(t, delta[:len(delta)-1], sum(delta[:len(delta)-1]), former,
			to.DiffID)),
		"the delta ends after its first frame": second(apply(t, delta[:4+binary.LittleEndian.Uint32(delta)],
			sum(delta[:4+binary.LittleEndian.Uint32(delta)]), former, to.DiffID)),
		"the delta is there twice": second(apply(t, append(slices.Clone(delta), delta...),
			sum(append(slices.Clone(delta), delta...)), former, to.DiffID)),
	} {
		if !fault.Is(err, fault.Unverified) {
			t.Errorf("UnpackDelta where %s = %v; want Unverified", name, err)
		}
	}
}

func second(_ string, err error) error { return err }

func TestUnpackDeltaStops(t *testing.T) {
	t.Parallel()
	former, from, to := layerPair(t)
	delta := makeDelta(t, plainOf(t, from), plainOf(t, to))
	dst := emptyRoot(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrClosedPipe)
	archive := TreeArchive(ctx, former, LayerModules, nil)
	err := UnpackDelta(ctx, bytes.NewReader(delta), sum(delta), int64(len(delta)), archive, to.DiffID, dst)
	if cerr := archive.Close(); cerr != nil || err == nil || !strings.Contains(err.Error(), io.ErrClosedPipe.Error()) {
		t.Errorf("UnpackDelta = %v, Close = %v; want the cause", err, cerr)
	}
}

// readRecorder records whether somebody read from it.
type readRecorder struct{ read bool }

func (r *readRecorder) Read([]byte) (int, error) {
	r.read = true
	return 0, io.ErrUnexpectedEOF
}

// TestUnpackDeltaCannotWrite checks a delta whose files cannot be written. UnpackDelta must not read the rest of the
// delta, and its error must not say that the delta is wrong.
func TestUnpackDeltaCannotWrite(t *testing.T) {
	t.Parallel()
	former, from, to := layerPair(t)
	delta := makeDelta(t, plainOf(t, from), plainOf(t, to))
	dst, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	archive := TreeArchive(t.Context(), former, LayerModules, nil)
	defer archive.Close()
	rest := &readRecorder{}
	first := delta[:4+binary.LittleEndian.Uint32(delta)]
	err = UnpackDelta(t.Context(), io.MultiReader(bytes.NewReader(first), rest), sum(delta), int64(len(delta)), archive,
		to.DiffID, dst)
	if !errors.Is(err, os.ErrClosed) || fault.Is(err, fault.Unverified) || rest.read {
		t.Errorf("UnpackDelta = %v, rest of the delta read %t; want the folder's error, and no more read", err, rest.read)
	}
}

// FuzzDelta checks that the output of a delta has at most one chunk for each frame.
func FuzzDelta(f *testing.F) {
	from := noise(7, 5<<20)
	for _, to := range [][]byte{nil, from[:1000], from[:deltaChunk+5], noise(8, 3000)} {
		f.Add(makeDelta(f, from, to))
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3})
	f.Fuzz(func(t *testing.T, delta []byte) {
		got, err := applyDelta(delta, from)
		if most := (len(delta)/5 + 1) * deltaChunk; len(got) > most {
			t.Errorf("%d bytes of a delta make %d", len(delta), len(got))
		}
		if len(got) > 2*len(from)+deltaSlack {
			t.Errorf("a delta makes %d bytes of %d", len(got), len(from))
		}
		if err == nil && len(delta) > 0 && len(got) == 0 {
			t.Error("a delta that makes nothing has bytes")
		}
	})
}
