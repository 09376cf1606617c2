package agent_test

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
)

// TestRollbackOfABusyDriver rolls back a driver while a program uses it. The driver must stay loaded until the node
// reboots or the GPU is idle, even if the fetcher is started again meanwhile. Then the agent must load the previous
// driver, and keep it.
func TestRollbackOfABusyDriver(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name   string
		then   func(t *testing.T, n *node) // ends the use of the newer driver
		unload bool                        // whether the agent then unloads the newer driver
		broken bool                        // whether the kernel refuses the older driver
		retry  bool                        // whether the operator asks for the newer driver again before the use ends
		want   string                      // the version of the loaded driver at the end
	}{
		{name: "reboot", then: func(t *testing.T, n *node) { n.reboot(t) }, want: oldVersion},
		{name: "idle", then: func(t *testing.T, n *node) { n.inUse(t, "0") }, unload: true, want: oldVersion},
		{name: "reboot, asked for again", then: func(t *testing.T, n *node) { n.reboot(t) }, retry: true, want: newVersion},
		{name: "idle, asked for again", then: func(t *testing.T, n *node) { n.inUse(t, "0") }, retry: true,
			want: newVersion},
		{name: "idle, and the previous one fails", then: func(t *testing.T, n *node) { n.inUse(t, "0") }, unload: true,
			broken: true, want: newVersion},
		{name: "reboot, and the previous one fails", then: func(t *testing.T, n *node) { n.reboot(t) }, broken: true,
			want: newVersion},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			n, ref, _, newer, po, pn := publishTwo(t, 1)
			if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
				t.Fatal(err)
			}
			n.inUse(t, "1")
			if _, err := n.rollback(); !fault.Is(err, fault.Busy) || !strings.Contains(fault.Hint(err), "reboot") ||
				!strings.Contains(fault.Hint(err), "fetcher install --retry --driver "+newVersion) ||
				!strings.Contains(fault.Hint(err), "--server") || len(n.kernel.calls) > 0 {
				t.Fatalf("Rollback = %v, hint %q, calls %v; want busy, and nothing done", err, fault.Hint(err), n.kernel.calls)
			}
			for range 2 { // the newer driver works, and its verdict is ready
				r, err := n.run(t, ref, pn.Digest, newer.Driver)
				if !fault.Is(err, fault.Busy) || r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != pn.Digest ||
					r.Pending == "" || len(n.kernel.calls) > 0 {
					t.Fatalf("Run = %+v, %v, pending %q, calls %v; want the present driver", r.Verdict, err, r.Pending,
						n.kernel.calls)
				}
			}
			if row.retry {
				n.cfg.Retry = true
				if _, err := n.run(t, ref, pn.Digest, newer.Driver); err != nil {
					t.Fatal(err)
				}
				n.cfg.Retry = false
			}
			if row.broken {
				n.kernel.refuse["nvidia "+oldVersion] = syscall.ENODEV
			}
			row.then(t, n)
			r, _ := n.run(t, ref, pn.Digest, newer.Driver) // the error says that the loaded driver is not the wanted one
			if got := slices.Contains(n.kernel.calls, "unload nvidia"); got != row.unload {
				t.Errorf("calls %v; want the present driver unloaded: %v", n.kernel.calls, row.unload)
			}
			for range 3 { // later runs change nothing
				r, _ = n.run(t, ref, pn.Digest, newer.Driver)
			}
			want := po.Digest
			if row.want == newVersion {
				want = pn.Digest
			}
			if r.Verdict.State != gpucheck.Ready || r.Verdict.Digest != want {
				t.Errorf("the verdict is %+v; want driver %s, ready", r.Verdict, row.want)
			}
			if diff := cmp.Diff([]string(nil), n.kernel.calls); diff != "" {
				t.Errorf("the last run made system calls (-want +got):\n%s", diff)
			}
		})
	}
}

// TestParametersAfterRevert lets the kernel refuse a new driver after the owner changed the module parameters. The
// former driver must be loaded with its own parameters again, and each run must say that the new ones wait.
func TestParametersAfterRevert(t *testing.T) {
	t.Parallel()
	n, ref, older, newer, po, pn := publishTwo(t, 1)
	n.cfg.ModuleParams = map[string]string{"nvidia": "NVreg_Foo=1"}
	n.kernel.refuse["nvidia "+newVersion] = syscall.ENOEXEC
	waits := func(r *agent.Report) bool {
		return len(r.Waiting) == 1 && strings.Contains(r.Waiting[0], "module parameters")
	}
	for i := range 2 {
		r, err := n.run(t, ref, pn.Digest, newer.Driver)
		if !fault.Is(err, fault.Rejected) || !waits(r) || !slices.Contains(n.kernel.calls, "load nvidia "+oldVersion) {
			t.Errorf("run %d with the newer driver: %q, %v, calls %q; want the older driver with its former parameters, "+
				"and a note on the new ones", i, r.Waiting, err, n.kernel.calls)
		}
		r, err = n.run(t, ref, po.Digest, older.Driver)
		if err != nil || !waits(r) || len(n.kernel.calls) > 0 {
			t.Errorf("run %d with the older driver: %q, %v, calls %q; want a note on the parameters, and nothing loaded", i,
				r.Waiting, err, n.kernel.calls)
		}
	}
	n.reboot(t)
	if r, err := n.run(t, ref, po.Digest, older.Driver); err != nil || len(r.Waiting) > 0 ||
		!slices.Contains(n.kernel.calls, "load nvidia "+oldVersion+" NVreg_Foo=1") {
		t.Errorf("after a reboot: %q, %v, calls %q; want the driver loaded with the new parameters", r.Waiting, err,
			n.kernel.calls)
	}
}
