package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/vm/internal/wire"
)

func TestFormatRecord(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name, record, want string
		ok                 bool
	}{
		{"plain", "4,339,5140900,-;NVRM: No NVIDIA GPU found.\n", "[    5.140900] NVRM: No NVIDIA GPU found.", true},
		{"dictionary", "6,1,7,-;text\n SUBSYSTEM=pci\n DEVICE=+pci:0001:00:00.0\n", "[    0.000007] text", true},
		{"escapes", `3,1,1000000,-;invalid:\x0aNVRM: BAR2\x5c`, `[    1.000000] invalid: NVRM: BAR2\`, true},
		{"cut escape", `3,1,1000000,-;a\x4`, `[    1.000000] a\x4`, true},
		{"more fields", "6,1,7,-,caller=T1;text", "[    0.000007] text", true},
		{"no text", "6,1,7,-", "", false},
		{"no time", "6,1,now,-;text", "", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if got, ok := formatRecord(row.record); got != row.want || ok != row.ok {
				t.Errorf("formatRecord(%q) = %q, %v; want %q, %v", row.record, got, ok, row.want, row.ok)
			}
		})
	}
}

func FuzzFormatRecord(f *testing.F) {
	f.Add("6,339,5140900,-;text\n SUBSYSTEM=pci")
	f.Add(`3,1,18446744073709551615,-;\x0a\x`)
	f.Add(";;;")
	f.Add(",,0;0\r0")
	f.Fuzz(func(t *testing.T, record string) {
		if len(record) > 1<<14 {
			return
		}
		if line, ok := formatRecord(record); ok && strings.ContainsAny(line, "\n\r") {
			t.Errorf("formatRecord(%q) = %q; want one line", record, line)
		}
	})
}

const procDevices = `Character devices:
  1 mem
195 nvidia-frontend
242 nvidia-uvm
244 nvidia-nvlink

Block devices:
242 virtblk
`

func TestNodes(t *testing.T) {
	t.Parallel()
	want := []node{
		{"/dev/nvidiactl", 195, 255}, {"/dev/nvidia0", 195, 0}, {"/dev/nvidia1", 195, 1},
		{"/dev/nvidia-modeset", 195, 254}, {"/dev/nvidia-uvm", 242, 0}, {"/dev/nvidia-uvm-tools", 242, 1},
	}
	if diff := cmp.Diff(want, nodes(charMajors(procDevices), 2), cmp.AllowUnexported(node{})); diff != "" {
		t.Errorf("nodes() (-want +got):\n%s", diff)
	}
	if got := nodes(charMajors("Block devices:\n242 nvidia-uvm\n"), 0); len(got) != 2 {
		t.Errorf("nodes() without uvm and GPU = %v; want control and modeset alone", got)
	}
}

func FuzzCharMajors(f *testing.F) {
	f.Add(procDevices)
	f.Add("Character devices:\n99999 x\n-1 y\n 7\n")
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 1<<14 {
			return
		}
		for name, major := range charMajors(text) {
			if major > 4095 || name == "" {
				t.Errorf("charMajors(%q) has %q = %d", text, name, major)
			}
		}
	})
}

// runSteps runs steps on this host, and returns the events that a guest would send for them.
func runSteps(t *testing.T, steps []wire.Step, extra map[string]builtin) []wire.Event {
	t.Helper()
	all := builtins()
	for name, f := range extra {
		all[name] = f
	}
	var stream bytes.Buffer
	r := &runner{host: &link{w: &stream}, builtins: all}
	r.run(steps)
	var events []wire.Event
	err := wire.Read(&stream, func(e wire.Event) error {
		e.Seconds = 0
		events = append(events, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func TestRunner(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	begin := func(i int) wire.Event { return wire.Event{Type: wire.Begin, Step: i} }
	for _, row := range []struct {
		name  string
		steps []wire.Step
		want  []wire.Event
	}{
		{"program, its streams and status", []wire.Step{{Argv: []string{"/bin/sh", "-c", "echo out; exit 3"}}},
			[]wire.Event{begin(0), {Type: wire.Output, Stream: "stdout", Data: []byte("out\n")}, {Type: wire.End, Exit: 3}}},
		{"environment", []wire.Step{{Argv: []string{"/bin/sh", "-c", "echo $A >&2"}, Env: []string{"A=b"}}},
			[]wire.Event{begin(0), {Type: wire.Output, Stream: "stderr", Data: []byte("b\n")}, {Type: wire.End}}},
		{"killed", []wire.Step{{Argv: []string{"/bin/sh", "-c", "kill -9 $$"}}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 137}}},
		{"failure stops", []wire.Step{{Argv: []string{"@insmod"}}, {Argv: []string{"@cat", file}}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 22, Error: "insmod: want FILE [PARAMETER...]: invalid argument"}}},
		{"failure may pass", []wire.Step{{Argv: []string{"@open", "/nothing"}, KeepGoing: true},
			{Argv: []string{"@cat", file}}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 2, Error: "open /nothing: no such file or directory"},
				begin(1), {Type: wire.Output, Step: 1, Stream: "stdout", Data: []byte("text")}, {Type: wire.End, Step: 1}}},
		{"no such built-in", []wire.Step{{Argv: []string{"@dance"}}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 127, Error: "there is no built-in command @dance"}}},
		{"no program", []wire.Step{{KeepGoing: true}, {Argv: []string{"", "x"}}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 127, Error: "the step names no program"},
				begin(1), {Type: wire.End, Step: 1, Exit: 127, Error: "the step names no program"}}},
		{"too long", []wire.Step{{Argv: []string{"/bin/sh", "-c", "sleep 60 & wait"}, TimeoutMS: 50}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 124, Error: "killed after 50ms"}}},
		{"built-in too long", []wire.Step{{Argv: []string{"@wait", "/nothing"}, TimeoutMS: 50}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: 124, Error: "the command @wait did not end within 50ms"}}},
		{"stop nothing", []wire.Step{{Argv: []string{"@stop", "x"}}},
			[]wire.Event{begin(0), {Type: wire.End, Exit: int(unix.ESRCH),
				Error: `stop "x": there is no such background step`}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(row.want, runSteps(t, row.steps, nil)); diff != "" {
				t.Errorf("run() (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRunnerBackground(t *testing.T) {
	t.Parallel()
	mark := filepath.Join(t.TempDir(), "up")
	hold := wire.Step{Name: "hold", Background: true,
		Argv: []string{"/bin/sh", "-c", "trap 'exit 5' TERM; : >" + mark + "; sleep 60 & wait"}}
	steps := []wire.Step{hold, {Name: "wait", Argv: []string{"@wait", mark}},
		{Name: "stop", Argv: []string{"@stop", "hold"}}}
	want := []wire.Event{
		{Type: wire.Begin}, {Type: wire.Begin, Step: 1}, {Type: wire.End, Step: 1},
		{Type: wire.Begin, Step: 2}, {Type: wire.End, Exit: 5}, {Type: wire.End, Step: 2, Exit: 5},
	}
	if diff := cmp.Diff(want, runSteps(t, steps, nil)); diff != "" {
		t.Errorf("run() with @stop (-want +got):\n%s", diff)
	}
	if err := os.Remove(mark); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(append(want[:3:3], want[4]), runSteps(t, steps[:2], nil)); diff != "" {
		t.Errorf("run() that ends without @stop (-want +got):\n%s", diff)
	}
}

func TestListShowsLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Symlink("target", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := list(context.Background(), []string{dir}, &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "link -> target") {
		t.Errorf("list() = %q; want the link's target", out.String())
	}
}

func TestModuleOrder(t *testing.T) {
	t.Parallel()
	order := filepath.Join(t.TempDir(), "order")
	if err := os.WriteFile(order, []byte("virtio.ko\n\nvirtio_net.ko\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := moduleOrder(order)
	if diff := cmp.Diff([]string{"virtio.ko", "virtio_net.ko"}, got); diff != "" || err != nil {
		t.Errorf("moduleOrder() = %v, %v", got, err)
	}
	if err := os.WriteFile(order, []byte("../virtio.ko\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := moduleOrder(order); err == nil {
		t.Error("moduleOrder() took a path; want an error")
	}
}
