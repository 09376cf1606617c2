package main

import (
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

// link is the guest's end of the event stream. Several goroutines may send at once.
type link struct {
	mu  sync.Mutex
	w   io.Writer
	log *kernelLog
}

// send writes one event to the host. If the write fails, send writes the error to the console.
func (l *link) send(e wire.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := wire.Write(l.w, e); err != nil {
		fmt.Fprintf(os.Stderr, "guestinit: %v\n", err)
	}
}

// kernel returns the kernel's log since the last call.
func (l *link) kernel() string {
	if l.log == nil {
		return ""
	}
	return l.log.read()
}

// output is an io.Writer that sends one stream of one step as events.
type output struct {
	host   *link
	step   int
	stream string
	sent   int
}

func (o *output) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), wire.MaxChunk)
		if o.sent < wire.MaxOutput {
			o.host.send(wire.Event{Type: wire.Output, Step: o.step, Stream: o.stream, Data: rest[:n]})
		}
		o.sent += n
		rest = rest[n:]
	}
	return len(p), nil
}
