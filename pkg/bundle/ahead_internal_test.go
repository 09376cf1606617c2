package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"
)

func TestReadAhead(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for _, size := range []int{0, 1, aheadPiece - 1, aheadPiece, aheadPiece + 1, 10*aheadPiece + 7} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i / 255)
		}
		for name, r := range map[string]io.Reader{
			"whole":              bytes.NewReader(want),
			"halves":             iotest.HalfReader(bytes.NewReader(want)),
			"error with content": iotest.DataErrReader(bytes.NewReader(want)),
			"breaks":             io.MultiReader(bytes.NewReader(want), iotest.ErrReader(broken)),
		} {
			t.Run(fmt.Sprint(name, " ", size), func(t *testing.T) {
				t.Parallel()
				a := readAhead(r)
				defer a.Close()
				got, err := io.ReadAll(a)
				if !bytes.Equal(got, want) {
					t.Errorf("ReadAll() = %d bytes; want the %d that went in", len(got), len(want))
				}
				if (name == "breaks") != errors.Is(err, broken) {
					t.Errorf("ReadAll() = %v; want %v only where the stream breaks", err, broken)
				}
			})
		}
	}
}

// TestReadAheadClose checks that the goroutine that reads ahead has ended when Close returns, even if the stream is
// endless.
func TestReadAheadClose(t *testing.T) {
	t.Parallel()
	var reads int // without a lock, so that the race detector reports a read after Close
	a := readAhead(readerFunc(func(p []byte) (int, error) {
		reads++
		return len(p), nil
	}))
	if _, err := io.CopyN(io.Discard, a, 3*aheadPiece+1); err != nil {
		t.Fatal(err)
	}
	a.Close()
	a.Close()
	if reads < 4 {
		t.Errorf("%d reads of the stream; want at least 4", reads)
	}
	if _, err := io.Copy(io.Discard, a); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Copy() after Close = %v; want %v", err, io.ErrClosedPipe)
	}
	if n, err := a.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Read() after that = %d, %v; want 0, %v", n, err, io.ErrClosedPipe)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
