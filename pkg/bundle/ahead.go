package bundle

import (
	"io"
	"sync"
)

const (
	// aheadPiece is the number of bytes that [aheadReader] reads at once. A block of zstd has at most 128 KiB (RFC 8878,
	// 3.1.1.2.4).
	aheadPiece = 128 << 10
	// aheadPieces is the number of pieces: one is being filled, one is being read, and one is full and waits.
	aheadPieces = 3
)

// aheadReader reads a stream in its own goroutine, at most [aheadPieces] pieces ahead. So a layer is downloaded,
// decompressed and written at the same time. The caller must call Close, which waits for a running read of the stream.
type aheadReader struct {
	full chan piece  // filled pieces; the last one has the error
	free chan []byte // empty pieces
	stop chan struct{}
	once sync.Once
	done chan struct{}

	now  piece // the piece that is being read
	rest []byte
}

type piece struct {
	buf []byte
	n   int
	err error
}

func readAhead(r io.Reader) *aheadReader {
	a := &aheadReader{
		full: make(chan piece, aheadPieces), free: make(chan []byte, aheadPieces),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	for range aheadPieces {
		a.free <- make([]byte, aheadPiece)
	}
	go func() {
		defer close(a.done)
		defer close(a.full)
		for {
			select {
			case <-a.stop:
				return
			case buf := <-a.free:
				p := piece{buf: buf}
				for p.n < len(buf) && p.err == nil {
					var n int
					n, p.err = r.Read(buf[p.n:])
					p.n += n
				}
				a.full <- p // does not block: the channel has room for all pieces
				if p.err != nil {
					return
				}
			}
		}
	}()
	return a
}

// Read returns the stream's bytes, and after them the stream's error.
func (a *aheadReader) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.now.err != nil {
			return 0, a.now.err
		}
		if a.now.buf != nil {
			a.free <- a.now.buf
		}
		next, ok := <-a.full
		if !ok {
			a.now = piece{err: io.ErrClosedPipe} // read after Close
			continue
		}
		a.now, a.rest = next, next.buf[:next.n]
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close ends the goroutine. Bytes that the caller has not read are lost.
func (a *aheadReader) Close() {
	a.once.Do(func() { close(a.stop) })
	<-a.done
}
