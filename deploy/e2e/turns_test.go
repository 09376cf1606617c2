package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// turns lets a few parallel tests run at a time, the longest first. Package testing starts parallel tests in no fixed
// order. If the longest test starts last, one processor has nothing to do meanwhile.
type turns struct {
	mu      sync.Mutex
	free    int
	waiting []waiting
}

// waiting is a test that waits for its turn.
type waiting struct {
	seconds int
	start   chan struct{} // closed when the test may run
}

// machineMemory is the memory in bytes that one test needs: a virtual node of 4 GiB, and what builds and boots it.
const machineMemory = 5 << 30

// newTurns returns turns for this machine: one more test at a time than it has processors, because tests also wait, but
// not more than its free memory allows.
func newTurns() (*turns, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		var kib int
		if n, _ := fmt.Sscanf(lines.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			return &turns{free: max(1, min(runtime.NumCPU()+1, kib<<10/machineMemory))}, nil
		}
	}
	return nil, errors.New("/proc/meminfo has no MemAvailable")
}

// gather is the time in which all parallel tests arrive: package testing continues them at the same moment.
const gather = 2 * time.Second

// take waits until it is the turn of a parallel test, which takes about so many seconds. The returned function ends the
// turn. A test that waits for its own parallel parts must end its turn before.
func (q *turns) take(seconds int) (end func()) {
	w := waiting{seconds, make(chan struct{})}
	q.mu.Lock()
	at, _ := slices.BinarySearchFunc(q.waiting, seconds, func(w waiting, seconds int) int { return seconds - w.seconds })
	q.waiting = slices.Insert(q.waiting, at, w)
	q.mu.Unlock()
	time.Sleep(gather)
	q.start(0)
	<-w.start
	return sync.OnceFunc(func() { q.start(1) })
}

// start starts the longest tests that wait, after so many turns have ended.
func (q *turns) start(ended int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.free += ended; q.free > 0 && len(q.waiting) > 0; q.free-- {
		close(q.waiting[0].start)
		q.waiting = q.waiting[1:]
	}
}

// TestTurns checks which tests wait for which others.
func TestTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q, begin := &turns{free: 2}, time.Now()
		var mu sync.Mutex
		var all sync.WaitGroup
		got := map[int]time.Duration{}
		for _, seconds := range []int{5, 50, 20, 40, 30} {
			all.Go(func() {
				end := q.take(seconds)
				defer end()
				mu.Lock()
				got[seconds] = time.Since(begin) - gather
				mu.Unlock()
				time.Sleep(time.Duration(seconds) * time.Second)
				end()
			})
		}
		all.Wait()
		want := map[int]time.Duration{50: 0, 40: 0, 30: 40 * time.Second, 20: 50 * time.Second, 5: 70 * time.Second}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("start of each test, by its time in seconds (-want +got):\n%s", diff)
		}
		if q.free != 2 {
			t.Errorf("in the end %d turns are free; want 2", q.free)
		}
	})
	if q, err := newTurns(); err != nil || q.free < 1 || q.free > runtime.NumCPU()+1 {
		t.Errorf("newTurns = %+v, %v; want a turn for this machine", q, err)
	}
}
