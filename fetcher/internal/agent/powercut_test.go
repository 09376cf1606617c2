package agent_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/faulttable"
	"github.com/prebake/prebake/pkg/testkit/program"
	"github.com/prebake/prebake/pkg/vm"
)

// faultPower cuts the power of the virtual machine in which the run is.
const faultPower = "power cut"

// TestPowerCut cuts the power of a virtual machine at the start of each phase of a run, and once more while a rollback
// waits. Data that was not flushed to disk is lost. The next run must end with a working driver.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	boot := os.Getenv("PREBAKE_BOOT")
	if boot == "" {
		t.Skip("PREBAKE_BOOT is not set: want a folder with vmlinuz and modules/; deploy/e2e makes it, and runs this test")
	}
	dir, key := t.TempDir(), testkit.NewKey(t)
	older, newer := cells(t)
	lay := filepath.Join(dir, "layout")
	common := order{
		Layout: "/layout", Keys: "/keys.pem", Fault: faultPower,
		Older: sample.Publish(t, "oci:"+lay, key, older).Digest, Newer: sample.Publish(t, "oci:"+lay, key, newer).Digest,
	}
	c := vm.Config{Boot: boot, Init: program.Build(t, "pkg/vm/guestinit", ""), Disk: filepath.Join(dir, "disk"),
		MemoryMiB: 1024, Timeout: 2 * time.Minute}
	if err := errors.Join(os.WriteFile(c.Disk, nil, 0o644), os.Truncate(c.Disk, 256<<20)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-F", "-t", "ext4",
		c.Disk).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if c.Files, err = vm.GlibcFiles(self); err != nil {
		t.Fatal(err)
	}
	c.Files = append(c.Files, vm.File{Name: "/test", Path: self, Mode: 0o755},
		vm.File{Name: "/keys.pem", Data: key.PEM(t)}, vm.File{Name: "/tmp"})
	err = filepath.WalkDir(lay, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			c.Files = append(c.Files, vm.File{Name: path.Join("/layout", strings.TrimPrefix(name, lay)), Path: name})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	var names []string
	rows := append(slices.Clone(rows), phaseRow{rollbackNoted, false})
	of := func(i int) order {
		o := common
		o.Phase, o.Boot, o.Root = rows[i].phase, rows[i].boot, fmt.Sprintf("/data/%d", i)
		return o
	}
	for i := 0; i <= len(rows); i++ {
		c.Steps = []vm.Step{{Argv: []string{"@mount", "/dev/vda", "/data"}}}
		if i > 0 {
			next := of(i - 1)
			next.Fault, next.Rebooted = "", true
			c.Steps = append(c.Steps, next.step(t, "next run"))
		}
		if i < len(rows) {
			o := of(i)
			o.SetUp = true
			c.Steps = append(c.Steps, o.step(t, "cut"))
			names = append(names, o.name())
		}
		res, err := vm.Run(t.Context(), c)
		if res == nil || err == nil && i < len(rows) || err != nil &&
			!strings.Contains(err.Error(), "switched itself off too early") {
			t.Fatalf("boot %d: %v", i, err)
		}
		if i > 0 {
			seen[names[i-1]+" "+faultPower] = of(i-1).judge(t, res)
		}
		if cut, ok := res.Step("cut"); i < len(rows) && (!ok || cut.Ended) {
			t.Fatalf("boot %d: the run was not cut: %s%s", i, cut.Stdout, cut.Stderr)
		}
	}
	faulttable.Table{
		File: "../../../docs/reference/node-faults.md", Name: "power ", Head: "phase", Columns: []string{faultPower},
		Rows: names, Seen: seen,
		Hint: "go test ./fetcher/internal/agent -run TestPowerCut -update, with PREBAKE_BOOT", Update: *update,
	}.Check(t)
}

// step returns the step of the virtual machine that executes the order.
func (o order) step(t *testing.T, name string) vm.Step {
	t.Helper()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return vm.Step{Name: name, Argv: []string{"/test", "-test.run=^TestFaultProcess$"},
		Env: []string{orderVariable + "=" + string(text)}, KeepGoing: true}
}

// judge checks the next run after a power cut. It returns which driver was active then, or the error of that run.
func (o order) judge(t *testing.T, res *vm.Result) string {
	t.Helper()
	step, ok := res.Step("next run")
	_, line, there := bytes.Cut(step.Stdout, []byte("OUTCOME "))
	line, _, _ = bytes.Cut(line, []byte("\n"))
	got := &outcome{}
	if !ok || !there || json.Unmarshal(line, got) != nil {
		t.Errorf("%s: the next run: no outcome in %s%s", o.name(), step.Stdout, step.Stderr)
		return "none"
	}
	want, class := o.Newer, ""
	if o.Phase == rollbackNoted { // the run also returns an error: the newer driver was rolled back
		want, class = o.Older, fault.Rejected.String()
	}
	if got.State != gpucheck.Ready || got.Problem != "" || got.Digest != want || got.Class != class {
		t.Errorf("%s: the next run: %+v; want driver %s ready, and class %q", o.name(), got, want, class)
	}
	return o.word(got) + ", " + map[bool]string{true: "from the disk", false: "fetched"}[got.Fetched == 0]
}
