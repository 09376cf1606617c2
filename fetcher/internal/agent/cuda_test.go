package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// cuda stands in for cuInit. Each call takes the next code, and the last code stays. With a version in unfit, the calls
// return unknown error while that driver is installed. The codes are those of cuda.h. NVIDIA's own library returned 0,
// 100 and 999 on a machine with an H200 (see nvmlprobe's TestCUDA).
type cuda struct {
	root, unfit string
	codes       []int
	err         error
	calls       int
}

func (c *cuda) AskCUDA(_ context.Context, library string) (gpucheck.CUDA, error) {
	c.calls++
	raw, err := os.ReadFile(filepath.Join(c.root, library))
	if err := errors.Join(err, c.err); err != nil {
		return gpucheck.CUDA{}, err
	}
	if string(raw) == "CUDA "+c.unfit {
		return gpucheck.CUDA{Code: 999, Name: "CUDA_ERROR_UNKNOWN"}, nil
	}
	if len(c.codes) == 0 {
		return gpucheck.CUDA{}, nil
	}
	answer := gpucheck.CUDA{Code: c.codes[0], Name: "NAME"}
	c.codes = c.codes[min(1, len(c.codes)-1):]
	return answer, nil
}

// mig stands in for NVML with a GPU in MIG mode.
type mig struct{ probe }

func (m mig) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	n, err := m.probe.Probe(ctx, library, persist)
	for i := range n.Devices {
		n.Devices[i].MIG = true
	}
	return n, err
}

func TestCUDA(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	without := c
	c.CUDA = true
	p := sample.Publish(t, ref, key, c)
	other := layout(t)
	po := sample.Publish(t, other, key, without)
	for name, row := range map[string]struct {
		cuda        cuda
		mig, off    bool
		without     bool
		state       gpucheck.State
		calls       int
		err, reason string
	}{
		"works":                   {state: gpucheck.Ready, calls: 1},
		"works at the second try": {cuda: cuda{codes: []int{2, 0}}, state: gpucheck.Ready, calls: 2},
		"fails":                   {cuda: cuda{codes: []int{999}}, state: gpucheck.Unusable, calls: 2, err: "NAME (999)"},
		"no device":               {cuda: cuda{codes: []int{100}}, state: gpucheck.Unusable, calls: 2, err: "NAME (100)"},
		"no device in MIG mode": {cuda: cuda{codes: []int{100}}, mig: true, state: gpucheck.Ready, calls: 2,
			reason: "MIG instances"},
		"another error in MIG mode": {cuda: cuda{codes: []int{999}}, mig: true, state: gpucheck.Unusable, calls: 2,
			err: "NAME (999)"},
		"waits for the fabric manager": {cuda: cuda{codes: []int{802}}, state: gpucheck.Starting, calls: 2,
			err: "nvidia-fabricmanager"},
		"cannot be asked":   {cuda: cuda{err: errors.New("no library")}, state: gpucheck.Ready, calls: 1},
		"does not answer":   {cuda: cuda{err: fmt.Errorf("ask: %w", gpucheck.ErrHung)}, calls: 1, err: "no answer"},
		"turned off":        {cuda: cuda{codes: []int{999}}, off: true, state: gpucheck.Ready},
		"not in the driver": {cuda: cuda{codes: []int{999}}, without: true, state: gpucheck.Ready},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c, 1, key)
			n.reboot(t)
			row.cuda.root = n.root
			n.parts.CUDA, n.cfg.NoCUDA = &row.cuda, row.off
			if row.mig {
				n.parts.Probe = mig{probe{n.root, 1}}
			}
			from, digest := ref, p.Digest
			if row.without {
				from, digest = other, po.Digest
			}
			r, err := n.run(t, from, digest, c.Driver)
			if r.Verdict.State != row.state || row.cuda.calls != row.calls || (err == nil) != (row.err == "") ||
				err != nil && !strings.Contains(err.Error(), row.err) || !strings.Contains(r.Verdict.Reason, row.reason) {
				t.Errorf("Run = %+v, %v, %d calls; want %s, %q, %q, %d calls", r.Verdict, err, row.calls, row.state, row.err,
					row.reason, row.calls)
			}
			if row.state == gpucheck.Unusable && r.Verdict.UsableGPUs != 0 {
				t.Errorf("%d GPUs are usable; want 0", r.Verdict.UsableGPUs)
			}
			// fetcher status reads the record.
			if s, err := agent.New(n.cfg, n.parts).Status(t.Context()); err != nil ||
				row.state != "" && (s.Verdict.State != row.state || s.Verdict.Reason != r.Verdict.Reason) {
				t.Errorf("Status = %+v, %v; want as the run", s.Verdict, err)
			}
		})
	}
}

// TestCUDAWorked checks that the agent does not ask again after a success, until the driver is loaded again. So a node
// in use does not count as unusable because one call failed.
func TestCUDAWorked(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	c.CUDA = true
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.reboot(t)
	asked := &cuda{root: n.root, codes: []int{0, 999}}
	n.parts.CUDA = asked
	for range 2 {
		if r, err := n.run(t, ref, p.Digest, c.Driver); err != nil || r.Verdict.State != gpucheck.Ready || asked.calls != 1 {
			t.Fatalf("Run = %+v, %v, %d calls; want ready, one call", r.Verdict, err, asked.calls)
		}
	}
	verdicts := n.monitored(t)
	if v := <-verdicts; v.State != gpucheck.Ready || asked.calls != 1 {
		t.Errorf("a check has %+v; want ready, without a call", v)
	}
	n.reboot(t)
	if r, err := n.run(t, ref, p.Digest, c.Driver); !fault.Is(err, fault.Unusable) ||
		r.Verdict.State != gpucheck.Unusable || asked.calls < 3 {
		t.Errorf("after a reboot, Run = %+v, %v, %d calls; want unusable", r.Verdict, err, asked.calls)
	}
	asked.codes = nil
	if v := <-n.monitored(t); v.State != gpucheck.Ready {
		t.Errorf("once CUDA works, a check has %+v; want ready", v)
	}
}

// monitored returns the verdicts of an agent that checks the driver.
func (n *node) monitored(t *testing.T) <-chan gpucheck.Verdict {
	t.Helper()
	verdicts := make(watched, 1)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- agent.New(n.cfg, n.parts).Monitor(ctx, time.Millisecond, verdicts) }()
	v := <-verdicts
	cancel()
	for {
		select {
		case <-verdicts:
			continue
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		}
		break
	}
	out := make(chan gpucheck.Verdict, 1)
	out <- v
	return out
}

// watched receives the verdicts of checks.
type watched chan gpucheck.Verdict

func (w watched) Report(v gpucheck.Verdict) { w <- v }
func (watched) Alive()                      {}
func (watched) CheckStarted()               {}
func (watched) CheckStopped()               {}

// TestCUDARollsBack checks that a node returns to the former driver if CUDA programs cannot start with the new one.
func TestCUDARollsBack(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	older.CUDA, newer.CUDA = true, true
	po, pn := sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n := newNode(t, older, 1, key)
	n.reboot(t)
	asked := &cuda{root: n.root}
	n.parts.CUDA = asked
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	asked.unfit = newVersion
	r, err := n.run(t, ref, pn.Digest, newer.Driver)
	if !fault.Is(err, fault.Unusable) || !strings.Contains(err.Error(), "CUDA_ERROR_UNKNOWN (999)") ||
		r.Verdict.Digest != po.Digest || r.Verdict.State != gpucheck.Ready || r.Changed {
		t.Errorf("Run = %+v, %v; want the former driver, ready", r.Verdict, err)
	}
	want := slices.Concat(loads(newVersion), loads(oldVersion))
	got := slices.DeleteFunc(slices.Clone(n.kernel.calls), func(s string) bool { return !strings.HasPrefix(s, "load") })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("loads (-want +got):\n%s", diff)
	}
}
