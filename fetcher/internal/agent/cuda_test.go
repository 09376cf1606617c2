package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
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

// cuda stands in for cuInit. Each call takes the next code, and the last code stays. While the driver version unfit is
// installed, all calls return unknown error. The codes are those of cuda.h. NVIDIA's own library returned 0, 100 and
// 999 on a machine with an H200 (see nvmlprobe's TestCUDA).
type cuda struct {
	root, unfit string
	codes       []int
	err         error
	calls       map[string]int // by version
	during      func()         // called in each call, if not nil
}

func (c *cuda) AskCUDA(_ context.Context, library string) (gpucheck.CUDA, error) {
	raw, err := os.ReadFile(filepath.Join(c.root, library))
	version := strings.TrimPrefix(string(raw), "CUDA ")
	if c.calls == nil {
		c.calls = map[string]int{}
	}
	c.calls[version]++
	if c.during != nil {
		c.during()
	}
	if err := errors.Join(err, c.err); err != nil {
		return gpucheck.CUDA{}, err
	}
	if version == c.unfit {
		return gpucheck.CUDA{Code: 999, Name: "CUDA_ERROR_UNKNOWN"}, nil
	}
	if len(c.codes) == 0 {
		return gpucheck.CUDA{}, nil
	}
	answer := gpucheck.CUDA{Code: c.codes[0], Name: "NAME"}
	c.codes = c.codes[min(1, len(c.codes)-1):]
	return answer, nil
}

// having stands in for NVML with one GPU that has these properties.
type having struct {
	root   string
	device gpucheck.Device
}

func (h having) Probe(ctx context.Context, library string, persist bool) (gpucheck.NVML, error) {
	n, err := probe{h.root, 1}.Probe(ctx, library, persist)
	n.Devices = []gpucheck.Device{h.device}
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
		"no device":               {cuda: cuda{codes: []int{100}}, state: gpucheck.Unusable, calls: 1, err: "NAME (100)"},
		"no device in MIG mode": {cuda: cuda{codes: []int{100}}, mig: true, state: gpucheck.Ready, calls: 1,
			reason: "MIG instances"},
		"another error in MIG mode": {cuda: cuda{codes: []int{999}}, mig: true, state: gpucheck.Unusable, calls: 2,
			err: "NAME (999)"},
		"waits for the fabric manager": {cuda: cuda{codes: []int{802}}, state: gpucheck.Starting, calls: 1,
			err: "nvidia-fabricmanager"},
		"cannot be asked": {cuda: cuda{err: errors.New("no library")}, state: gpucheck.Ready, calls: 1},
		"does not answer": {cuda: cuda{err: fmt.Errorf("ask: %w", gpucheck.ErrHung)}, state: gpucheck.Unusable, calls: 1,
			err: "cuInit does not return"},
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
				n.parts.Probe = having{n.root, gpucheck.Device{MIG: true}}
			}
			from, digest := ref, p.Digest
			if row.without {
				from, digest = other, po.Digest
			}
			r, err := n.run(t, from, digest, c.Driver)
			if r.Verdict.State != row.state || row.cuda.calls[newVersion] != row.calls || (err == nil) != (row.err == "") ||
				err != nil && !strings.Contains(err.Error(), row.err) || !strings.Contains(r.Verdict.Reason, row.reason) {
				t.Errorf("Run = %+v, %v, %d calls; want %s, %q, %q, %d calls", r.Verdict, err, row.cuda.calls[newVersion],
					row.state, row.err, row.reason, row.calls)
			}
			if row.state == gpucheck.Unusable && r.Verdict.UsableGPUs != 0 {
				t.Errorf("%d GPUs are usable; want 0", r.Verdict.UsableGPUs)
			}
			if row.state == gpucheck.Ready { // a ready node is not asked again
				if v := n.checked(t); v.State != gpucheck.Ready || row.cuda.calls[newVersion] != row.calls {
					t.Errorf("a check: %+v, %v calls; want ready, %d calls", v, row.cuda.calls, row.calls)
				}
			}
			// fetcher status reads the record.
			if s, err := agent.New(n.cfg, n.parts).Status(t.Context()); err != nil ||
				(s.Verdict.State != row.state || s.Verdict.Reason != r.Verdict.Reason) {
				t.Errorf("Status = %+v, %v; want as the run", s.Verdict, err)
			}
		})
	}
}

// withCUDA returns a node whose driver has just been loaded, and CUDA worked.
func withCUDA(t *testing.T) (n *node, asked *cuda, run func() (*agent.Report, error)) {
	t.Helper()
	key, ref := testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	c.CUDA = true
	p := sample.Publish(t, ref, key, c)
	n = newNode(t, c, 1, key)
	n.reboot(t)
	asked = &cuda{root: n.root}
	n.parts.CUDA = asked
	run = func() (*agent.Report, error) { return n.run(t, ref, p.Digest, c.Driver) }
	if r, err := run(); err != nil || r.Verdict.State != gpucheck.Ready || asked.calls[newVersion] != 1 {
		t.Fatalf("Run = %+v, %v, %v calls; want ready, one call", r.Verdict, err, asked.calls)
	}
	return n, asked, run
}

// TestCUDAWorked checks that cuInit is not called again after a success, until the driver is loaded again. So a node in
// use does not count as unusable because one call failed.
func TestCUDAWorked(t *testing.T) {
	t.Parallel()
	n, asked, run := withCUDA(t)
	asked.codes = []int{999}
	if r, err := run(); err != nil || r.Verdict.State != gpucheck.Ready || r.Verdict.CUDA == nil {
		t.Errorf("a second run: %+v, %v; want ready", r.Verdict, err)
	}
	if v := n.checked(t); v.State != gpucheck.Ready || v.CUDA == nil || asked.calls[newVersion] != 1 {
		t.Errorf("a check: %+v, %v calls; want ready, without a call", v, asked.calls)
	}
	n.reboot(t)
	if r, err := run(); !fault.Is(err, fault.Unusable) || r.Verdict.State != gpucheck.Unusable ||
		asked.calls[newVersion] < 3 {
		t.Errorf("after a reboot: %+v, %v, %v calls; want unusable", r.Verdict, err, asked.calls)
	}
	// While NVML has no healthy GPU, cuInit is not called. Its failure stays recorded.
	before := asked.calls[newVersion]
	n.parts.Probe = probe{n.root, 0}
	if v := n.checked(t); v.State != gpucheck.Unusable || asked.calls[newVersion] != before {
		t.Errorf("a check without a GPU: %+v, %v calls; want unusable, without a call", v, asked.calls)
	}
	n.parts.Probe = probe{n.root, 1}
	if v := n.checked(t); v.State != gpucheck.Unusable {
		t.Errorf("a check with the GPU again: %+v; want unusable, because CUDA still fails", v)
	}
	asked.codes = nil
	if v := n.checked(t); v.State != gpucheck.Ready {
		t.Errorf("once CUDA works: %+v; want ready", v)
	}
}

// TestCUDAAfterLoad checks that cuInit is called again if a run loads nvidia-uvm alone.
func TestCUDAAfterLoad(t *testing.T) {
	t.Parallel()
	n, asked, run := withCUDA(t)
	const file = "proc/modules"
	raw, err := os.ReadFile(filepath.Join(n.root, file))
	if err != nil {
		t.Fatal(err)
	}
	sample.Write(t, n.root, file, regexp.MustCompile(`(?m)^nvidia_uvm .*\n`).ReplaceAllString(string(raw), ""))
	if err := os.RemoveAll(filepath.Join(n.root, "sys/module/nvidia_uvm")); err != nil {
		t.Fatal(err)
	}
	asked.codes = []int{999}
	if r, err := run(); !fault.Is(err, fault.Unusable) || !slices.Contains(n.kernel.calls, "load nvidia_uvm "+newVersion) {
		t.Errorf("Run = %+v, %v, system calls %v; want nvidia_uvm loaded, and unusable", r.Verdict, err, n.kernel.calls)
	}
}

// TestCUDAAfterFabric checks that cuInit is called once NVML reports the NVLink fabric as ready, although another
// process loaded the driver, and although the first call was cancelled.
func TestCUDAAfterFabric(t *testing.T) {
	t.Parallel()
	key, ref := testkit.NewKey(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	c.CUDA = true
	p := sample.Publish(t, ref, key, c)
	n := newNode(t, c, 1, key)
	n.reboot(t)
	asked := &cuda{root: n.root, codes: []int{999}}
	n.parts.CUDA, n.parts.Probe = asked, having{n.root, gpucheck.Device{Fabric: "in progress"}}
	if r, _ := n.run(t, ref, p.Digest, c.Driver); r.Verdict.State != gpucheck.Starting || len(asked.calls) > 0 {
		t.Fatalf("Run = %+v, %v calls; want starting, no call", r.Verdict, asked.calls)
	}
	n.parts.Probe = having{n.root, gpucheck.Device{Fabric: "completed"}}
	ctx, cancel := context.WithCancel(t.Context())
	asked.during = cancel
	a := agent.New(n.cfg, n.parts)
	w := watched{verdicts: make(chan gpucheck.Verdict, 1), done: func() {}}
	if err := a.Monitor(ctx, time.Millisecond, w); err != nil || len(w.verdicts) > 0 || len(asked.calls) == 0 {
		t.Errorf("a cancelled check: %v, %d verdicts, %v calls; want no verdict", err, len(w.verdicts), asked.calls)
	}
	asked.during = nil
	if v := n.checked(t); v.State != gpucheck.Unusable {
		t.Errorf("the next check: %+v; want unusable", v)
	}
}

// TestCUDAAfterMIG checks that cuInit is called again if GPUs leave MIG mode.
func TestCUDAAfterMIG(t *testing.T) {
	t.Parallel()
	n, asked, run := withCUDA(t)
	n.reboot(t)
	n.parts.Probe, asked.codes = having{n.root, gpucheck.Device{MIG: true}}, []int{100}
	if r, err := run(); err != nil || r.Verdict.State != gpucheck.Ready {
		t.Fatalf("Run = %+v, %v; want ready", r.Verdict, err)
	}
	n.parts.Probe, asked.codes = probe{n.root, 1}, nil
	if v := n.checked(t); v.State != gpucheck.Ready || v.CUDA == nil || v.CUDA.Code != 0 {
		t.Errorf("without MIG: %+v; want ready, and CUDA asked", v)
	}
}

// withUnfit publishes two drivers, and returns a node on which the older one is active. CUDA cannot start with the
// newer one.
func withUnfit(t *testing.T) (n *node, asked *cuda, ref string, newer sample.Cell, po, pn sample.Published) {
	t.Helper()
	key, ref := testkit.NewKey(t), layout(t)
	older, newer := sample.NewCell(t, buildA, oldVersion), sample.NewCell(t, buildA, newVersion)
	older.CUDA, newer.CUDA = true, true
	po, pn = sample.Publish(t, ref, key, older), sample.Publish(t, ref, key, newer)
	n = newNode(t, older, 1, key)
	n.reboot(t)
	asked = &cuda{root: n.root, unfit: newVersion}
	n.parts.CUDA = asked
	if _, err := n.run(t, ref, po.Digest, older.Driver); err != nil {
		t.Fatal(err)
	}
	return n, asked, ref, newer, po, pn
}

// TestCUDAAfterBusyRollback fails a new driver that then cannot be unloaded. As long as cuInit fails, the driver must
// not count as ready, although the record is about the former driver and a program has nvidia-uvm open.
func TestCUDAAfterBusyRollback(t *testing.T) {
	t.Parallel()
	n, asked, ref, newer, _, pn := withUnfit(t)
	asked.during = func() { n.inUse(t, "1") }
	n.answer(ref, pn.Digest, newer.Driver)
	a := agent.New(n.cfg, n.parts)
	if _, err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "stays active") {
		t.Fatalf("Run = %v; want that the new driver stays active", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	checks := 0
	w := watched{verdicts: make(chan gpucheck.Verdict, 9), done: func() {
		if checks++; checks == 3 {
			cancel()
		}
	}}
	if err := a.Monitor(ctx, time.Millisecond, w); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if v := <-w.verdicts; v.State != gpucheck.Unusable || !v.OnlyCUDA {
			t.Errorf("a check: %+v; want unusable for CUDA", v)
		}
	}
}

// TestCUDAInUse checks on which loaded drivers cuInit is called although this run did not load them: on those that no
// run has checked since the boot, unless a program has nvidia-uvm open.
func TestCUDAInUse(t *testing.T) {
	t.Parallel()
	const file = installDir + "/.prebake/verdict.json"
	for name, row := range map[string]struct {
		record func(raw string) string // "" means no record
		refs   string
		state  gpucheck.State
	}{
		"a record of a former release": {func(raw string) string {
			return regexp.MustCompile(`(?s)"cuda": \{[^}]*\},`).ReplaceAllString(raw, "")
		}, "0", gpucheck.Ready},
		"no record":                {func(string) string { return "" }, "0", gpucheck.Unusable},
		"no record, and a program": {func(string) string { return "" }, "1", gpucheck.Ready},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, asked, run := withCUDA(t)
			raw, err := os.ReadFile(filepath.Join(n.root, file))
			if err != nil {
				t.Fatal(err)
			}
			changed := row.record(string(raw))
			if changed == string(raw) {
				t.Fatalf("the record has no answer of CUDA: %s", raw)
			}
			sample.Write(t, n.root, file, changed)
			if changed == "" {
				if err := os.Remove(filepath.Join(n.root, file)); err != nil {
					t.Fatal(err)
				}
			}
			n.inUse(t, row.refs)
			asked.codes = []int{999}
			if r, _ := run(); r.Verdict.State != row.state {
				t.Errorf("Run = %+v; want %s", r.Verdict, row.state)
			}
		})
	}
}

// checked returns the verdict of one check.
func (n *node) checked(t *testing.T) (v gpucheck.Verdict) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := watched{verdicts: make(chan gpucheck.Verdict, 1), done: cancel}
	if err := agent.New(n.cfg, n.parts).Monitor(ctx, time.Millisecond, w); err != nil {
		t.Fatal(err)
	}
	return <-w.verdicts
}

// watched takes one verdict, and then ends the checks.
type watched struct {
	verdicts chan gpucheck.Verdict
	done     func()
}

func (w watched) Report(v gpucheck.Verdict) {
	select {
	case w.verdicts <- v:
	default:
	}
	w.done()
}
func (watched) Alive()        {}
func (watched) CheckStarted() {}
func (watched) CheckStopped() {}

// TestCUDARollsBack checks that a node returns to the former driver if CUDA programs cannot start with the new one.
func TestCUDARollsBack(t *testing.T) {
	t.Parallel()
	n, asked, ref, newer, po, pn := withUnfit(t)
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
	if diff := cmp.Diff(map[string]int{oldVersion: 2, newVersion: 2}, asked.calls); diff != "" {
		t.Errorf("calls of cuInit (-want +got):\n%s", diff)
	}
}
