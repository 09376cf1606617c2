package bundle

import (
	"io"
	"sync"
)

const (
	// aheadPiece is how much one read of [ahead] brings: a block of zstd has 128 KiB at most
	// (RFC 8878, 3.1.1.2.4).
	aheadPiece = 128 << 10
	// aheadPieces is how many pieces there are: one is being filled, one is being read, and
	// one waits, so that neither side waits for the other at each piece.
	aheadPieces = 3
)

// ahead reads a stream in a goroutine of its own, at most [aheadPieces] pieces ahead of whoever
// reads from it: a layer is fetched, decompressed and written at the same time.
// Close has to be called, and waits for a read of the stream that is running.
type ahead struct {
	full chan piece  // pieces with content, and the error behind them
	free chan []byte // pieces without
	stop chan struct{}
	once sync.Once
	done chan struct{}

	now  piece // what is being read
	rest []byte
}

type piece struct {
	buf []byte
	n   int
	err error
}

func readAhead(r io.Reader) *ahead {
	a := &ahead{
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
				a.full <- p // has room for all pieces
				if p.err != nil {
					return
				}
			}
		}
	}()
	return a
}

// Read returns what the stream returned, and its error behind all that came before it.
func (a *ahead) Read(p []byte) (int, error) {
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

// Close ends the goroutine. What it read besides is lost.
func (a *ahead) Close() {
	a.once.Do(func() { close(a.stop) })
	<-a.done
}
