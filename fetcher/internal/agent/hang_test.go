package agent_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/report"
)

// stalling stands in for a probe. Each call takes the next time of the list, and the calls after the list take none. As
// [gpucheck.Prober] does, it gives up after two minutes, and while a stuck probe remains, calls fail at once.
type stalling struct {
	probe
	takes []time.Duration
	stuck time.Time // until when a probe is stuck
}

func (s *stalling) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	hung := fmt.Errorf("ask NVML: %w", gpucheck.ErrHung)
	if time.Now().Before(s.stuck) {
		return gpucheck.NVML{}, hung
	}
	if len(s.takes) == 0 {
		return s.probe.Probe(ctx, library, persist)
	}
	takes, end := s.takes[0], time.Now().Add(s.takes[0])
	s.takes = s.takes[1:]
	if takes < 0 {
		return gpucheck.NVML{}, errors.New("the probe was not found")
	}
	time.Sleep(min(takes, 2*time.Minute))
	if takes > 2*time.Minute {
		s.stuck = end
		return gpucheck.NVML{}, hung
	}
	return s.probe.Probe(ctx, library, persist)
}

// TestHangWhileWatched checks that a node is not ready while NVML hangs: from a minute after the start of the check
// that hangs until a later check is answered. The process stays alive, because a new one could not help.
func TestHangWhileWatched(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name     string
		takes    []time.Duration
		from, to time.Duration // when the node is not ready; the first check starts at 1m
	}{
		{"fast", nil, 0, 0},
		{"slow", []time.Duration{40 * time.Second, 55 * time.Second}, 0, 0},
		{"one check of 70 s", []time.Duration{0, 70 * time.Second}, 3 * time.Minute, 3*time.Minute + 10*time.Second},
		// As on a machine with 16 GPUs that takes this long each time. The first check shows it.
		{"all checks take 70 s", slices.Repeat([]time.Duration{70 * time.Second}, 10), 2 * time.Minute, 130 * time.Second},
		{"stuck for 20 minutes", []time.Duration{0, 20 * time.Minute}, 3 * time.Minute, 22 * time.Minute},
		{"the probe fails twice", []time.Duration{-1, -1}, 0, 0},
		{"stuck, then the probe fails", []time.Duration{3 * time.Minute, -1}, 2 * time.Minute, 5 * time.Minute},
	} {
		n, ref, c, p := bare(t)
		if _, err := n.run(t, ref, p.Digest, c.Driver); err != nil {
			t.Fatal(err)
		}
		n.parts.Probe = &stalling{probe: probe{n.root, 1}, takes: row.takes}
		synctest.Test(t, func(t *testing.T) {
			const every = time.Minute
			ctx, cancel := context.WithCancel(t.Context())
			s := report.New(time.Now)
			s.Report(gpucheck.Verdict{State: gpucheck.Ready})
			s.Watch(6 * time.Minute)
			start, done := time.Now(), make(chan error)
			go func() { done <- agent.New(n.cfg, n.parts).Monitor(ctx, every, s) }()
			time.Sleep(time.Second / 2)
			for at := time.Since(start); at < 30*time.Minute; at += time.Second {
				want := http.StatusOK
				if row.from <= at && at < row.to {
					want = http.StatusServiceUnavailable
				}
				if ready, healthy := ask(s, "/readyz"), ask(s, "/healthz"); ready != want || healthy != http.StatusOK {
					t.Errorf("%s: after %v, /readyz = %d, /healthz = %d; want %d, 200", row.name, at, ready, healthy, want)
					break
				}
				time.Sleep(time.Second)
			}
			cancel()
			if err := <-done; err != nil {
				t.Errorf("%s: Monitor = %v", row.name, err)
			}
		})
	}
}

// ask returns the status of a GET.
func ask(h http.Handler, path string) int {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code
}
