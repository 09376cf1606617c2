package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kube"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/pkg/fault"
)

// labelAfter returns a function awaitLabel of a daemon. It finds a change of the label after the given time, once.
func labelAfter(d time.Duration) func(context.Context) bool {
	start := time.Now()
	return func(ctx context.Context) bool {
		left := d - time.Since(start)
		if left <= 0 { // it changed before
			left = 100 * time.Hour
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(left):
			return true
		}
	}
}

// TestMalformedLabel checks a node without a driver and with a malformed label. The program must not end, because its
// next start would find the same label. It must report the reason, and run again when the label changes.
func TestMalformedLabel(t *testing.T) {
	t.Parallel()
	malformed := fault.Wrap(fault.Usage, fmt.Errorf("read %w: driver newest", kube.ErrLabel), "correct the label")
	synctest.Test(t, func(t *testing.T) {
		out := report.New(time.Now)
		var runs []time.Duration
		start := time.Now()
		node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
			runs = append(runs, time.Since(start))
			if n < 4 {
				return &agent.Report{}, malformed
			}
			return &agent.Report{Verdict: readyVerdict}, nil
		}, watch: func(context.Context, int) error { return nil }}
		k := daemonOf(node, out, gpucheck.Verdict{State: gpucheck.Absent, Modules: map[string]string{}})
		k.awaitLabel = labelAfter(25 * time.Minute)
		done := make(chan error, 1)
		go func() { done <- k.stay(t.Context()) }()
		time.Sleep(24 * time.Minute)
		w := httptest.NewRecorder()
		out.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), kube.LabelWanted) ||
			status(out, "/healthz") != http.StatusOK {
			t.Errorf("/readyz = %d %s, /healthz = %d; want not ready with the reason, and alive", w.Code, w.Body,
				status(out, "/healthz"))
		}
		if err := <-done; err != nil || status(out, "/readyz") != http.StatusOK {
			t.Errorf("stay = %v, /readyz = %d; want the driver ready", err, status(out, "/readyz"))
		}
		want := []time.Duration{0, 10 * time.Minute, 20 * time.Minute, 25 * time.Minute}
		if fmt.Sprint(runs) != fmt.Sprint(want) {
			t.Errorf("runs after %v; want %v", runs, want)
		}
	})
}

// TestMalformedLabelIsPending checks nodes with a malformed label whose run has a verdict, but no driver to watch. The
// verdict says nothing about the label, so the reason must be pending. Without a verdict of the run, the reported one
// has the reason.
func TestMalformedLabelIsPending(t *testing.T) {
	t.Parallel()
	malformed := fault.Wrap(fault.Usage, fmt.Errorf("read %w: driver newest", kube.ErrLabel), "correct the label")
	staged := gpucheck.Verdict{State: gpucheck.Staged, Reason: "installed, and by request not loaded"}
	noDevice := gpucheck.Verdict{State: gpucheck.NoDevice, Reason: "no GPU"}
	for _, row := range []struct {
		name string
		v    gpucheck.Verdict
		err  error
		want string
	}{
		{"no driver", gpucheck.Verdict{}, malformed, "<nil>"},
		{"a driver that is not to be loaded", staged, malformed, malformed.Error()},
		{"no GPU", noDevice, errors.Join(noDevice.Err(), malformed), malformed.Error()},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				node := &scripted{run: func(context.Context, int) (*agent.Report, error) {
					return &agent.Report{Verdict: row.v}, row.err
				}}
				k := daemonOf(node, report.New(time.Now), unloadedState)
				k.awaitLabel = labelAfter(time.Hour)
				var pending []string
				k.pending = func(why error) { pending = append(pending, fmt.Sprint(why)) }
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := k.stay(ctx); err != nil || strings.Join(pending, "|") != row.want {
					t.Errorf("stay = %v, pending %q; want nil, %q", err, pending, row.want)
				}
			})
		})
	}
}

// TestRelabelledRun checks that the daemon runs again at once after a run that ended because the label had changed.
// That run has read the label, so the daemon's own reads find no change.
func TestRelabelledRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
			if n == 1 {
				return &agent.Report{Verdict: readyVerdict, Relabelled: true}, fault.New(fault.Busy, "a program uses the GPU", "")
			}
			return &agent.Report{Verdict: readyVerdict}, nil
		}, watch: func(ctx context.Context, n int) error {
			if n == 1 {
				<-ctx.Done()
			}
			return nil
		}}
		k, start := daemonOf(node, report.New(time.Now), unloadedState), time.Now()
		k.awaitLabel = labelAfter(100 * time.Hour)
		if err := k.stay(t.Context()); err != nil || node.runs != 2 || time.Since(start) != 0 {
			t.Errorf("stay = %v after %d runs and %v; want nil after 2 runs, at once", err, node.runs, time.Since(start))
		}
	})
}

// TestMalformedLabelEnds checks that the program ends without an error if it is stopped while it waits for a label.
func TestMalformedLabelEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		node := &scripted{run: func(context.Context, int) (*agent.Report, error) {
			return &agent.Report{}, fault.Wrap(fault.Usage, kube.ErrLabel, "correct the label")
		}}
		k := daemonOf(node, report.New(time.Now), unloadedState)
		k.awaitLabel = labelAfter(time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := k.stay(ctx); err != nil || node.runs != 1 {
			t.Errorf("stay = %v after %d runs; want nil after 1", err, node.runs)
		}
	})
}

// TestRelabelled checks that a change of the label ends the watch of a ready driver, and that another run follows.
func TestRelabelled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start, took := time.Now(), time.Duration(0)
		node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
			if n == 2 {
				took = time.Since(start)
			}
			return &agent.Report{Verdict: readyVerdict}, nil
		}, watch: func(ctx context.Context, n int) error {
			if n == 1 {
				<-ctx.Done()
			}
			return nil
		}}
		k := daemonOf(node, report.New(time.Now), readyVerdict)
		k.awaitLabel = labelAfter(3 * time.Hour)
		if err := k.stay(t.Context()); err != nil || node.runs != 2 || took != 3*time.Hour {
			t.Errorf("stay = %v after %d runs, the second after %v; want nil, 2, 3h", err, node.runs, took)
		}
	})
}

// TestUnconfirmed checks a node whose farm did not say which driver the new label means. The label was read, so no
// change of the label will start another run. The daemon must run again nevertheless, and report the reason until then.
func TestUnconfirmed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start, took := time.Now(), time.Duration(0)
		node := &scripted{run: func(_ context.Context, n int) (*agent.Report, error) {
			took = time.Since(start)
			r := &agent.Report{Verdict: readyVerdict, Unconfirmed: n == 1}
			r.Answer.Reason = "nobody answers"
			return r, nil
		}, watch: func(ctx context.Context, n int) error {
			if n == 1 {
				<-ctx.Done()
			}
			return nil
		}}
		k := daemonOf(node, report.New(time.Now), readyVerdict)
		k.awaitLabel = labelAfter(3 * time.Hour)
		var pending []string
		k.pending = func(why error) { pending = append(pending, fmt.Sprint(why)) }
		if err := k.stay(t.Context()); err != nil || node.runs != 2 || took != retryChecks*time.Minute ||
			strings.Join(pending, "|") != "nobody answers|<nil>" {
			t.Errorf("stay = %v after %d runs, the second after %v, pending %q; want nil, 2, 10m, and the reason once", err,
				node.runs, took, pending)
		}
	})
}
