package compile

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/timeline"
)

func TestDiagnose(t *testing.T) {
	t.Parallel()
	failed := fmt.Errorf("run make: %w", &sandbox.ExitError{Status: 2})
	rows := []struct {
		name, log string
		err       error
		kind      fault.Kind
		text      string
	}{
		{
			"function changed", `
  CC [M]  /prebake/src/nvidia/nv-pci.o
/prebake/src/nvidia/nv-pci.c: In function 'nv_resize':
/prebake/src/nvidia/nv-pci.c:223:9: error: too few arguments to function 'pci_resize_resource'
  223 |     r = pci_resize_resource(dev, 1, size);
/prebake/src/nvidia/nv-pci.c:301:1: error: a later one
make[3]: *** [/prebake/kernel/scripts/Makefile.build:250: /prebake/src/nvidia/nv-pci.o] Error 1
make: *** [Makefile:82: modules] Error 2
`, failed, fault.APIBreak, "nvidia/nv-pci.c:223:9: error: too few arguments to function 'pci_resize_resource'",
		},
		{
			"header gone", "/prebake/src/common/inc/nv-linux.h:21:10: fatal error: linux/gone.h: No such file or directory\n",
			failed, fault.APIBreak, "common/inc/nv-linux.h:21:10: fatal error: linux/gone.h: No such file or directory",
		},
		{
			"in a kernel header", "/prebake/kernel/include/linux/mm.h:7:1: error: unknown type name 'x'\n",
			failed, fault.APIBreak, "<kernel>/include/linux/mm.h:7:1: error: unknown type name 'x'",
		},
		{
			"without a column", "/prebake/src/a.c:7: error: x\n", failed, fault.APIBreak, "a.c:7: error: x",
		},
		{
			"symbol not exported", `
  MODPOST /prebake/src/Module.symvers
ERROR: modpost: "screen_info" [/prebake/src/nvidia-modeset.ko] undefined!
make[2]: *** [/prebake/kernel/scripts/Makefile.modpost:126: /prebake/src/Module.symvers] Error 1
`, failed, fault.APIBreak, `modpost: "screen_info" [nvidia-modeset.ko] undefined!`,
		},
		{
			"sanity check", "The Module.symvers file is missing, or\nmake[3]: *** [/prebake/src/Kbuild:327: " +
				"module_symvers_sanity_check] Error 1\n",
			failed, fault.InputMissing, "the kernel's Module.symvers is missing or empty",
		},
		{
			"real-time kernel", "make[3]: *** [/prebake/src/Kbuild:327: preempt_rt_sanity_check] Error 1\n",
			failed, fault.Unsupported, "the driver does not support a real-time kernel",
		},
		{
			"program missing", "/bin/sh: 1: x86_64-cros-linux-gnu-ld: not found\nmake[2]: *** [/prebake/src/Kbuild:9: a.o] " +
				"Error 127\n",
			failed, fault.Internal, "/bin/sh: 1: x86_64-cros-linux-gnu-ld: not found",
		},
		{
			"no make", "prlimit: failed to execute make: No such file or directory\n",
			failed, fault.Internal, "prlimit: failed to execute make: No such file or directory",
		},
		{
			"wrong flag", "gcc: error: unrecognized command-line option '-mharden-sls=all'\nmake[2]: *** " +
				"[/prebake/kernel/scripts/Makefile.build:250: /prebake/src/a.o] Error 1\n",
			failed, fault.Internal, "make: [<kernel>/scripts/Makefile.build:250: a.o] Error 1; the line before this " +
				"message: gcc: " +
				"error: unrecognized command-line option '-mharden-sls=all'",
		},
		{
			"no such target", "make: *** No rule to make target 'modules'.  Stop.\n", failed, fault.Internal,
			"make: No rule to make target 'modules'.  Stop.",
		},
		{
			"compiler killed", "x86_64-cros-linux-gnu-gcc: fatal error: Killed signal terminated program cc1\ncompilation " +
				"terminated.\n",
			failed, fault.OutOfMemory, "x86_64-cros-linux-gnu-gcc: fatal error: Killed signal terminated program cc1",
		},
		{
			"memory refused", "cc1: out of memory allocating 65536 bytes after a total of 1 bytes\n", failed, fault.OutOfMemory,
			"cc1: out of memory allocating 65536 bytes after a total of 1 bytes",
		},
		{
			"linker killed", "make[2]: *** [/prebake/src/Kbuild:9: nvidia.o] Killed\n", failed, fault.OutOfMemory,
			"make[2]: *** [Kbuild:9: nvidia.o] Killed",
		},
		{
			"sandbox killed", "", fmt.Errorf("run make: %w", &sandbox.ExitError{Status: 137}), fault.OutOfMemory,
			"the compile was killed, probably because memory ran out",
		},
		{
			"disk full before an error that follows from it", `
/prebake/src/a.c:9:1: fatal error: error writing to /tmp/ccxyz.s: No space left on device
`, failed, fault.DiskFull, "a.c:9:1: fatal error: error writing to /tmp/ccxyz.s: No space left on device",
		},
		{"newer C library", "/prebake/kernel/scripts/basic/fixdep: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' " +
			"not found (required by /prebake/kernel/scripts/basic/fixdep)\nmake[3]: *** " +
			"[/prebake/kernel/scripts/Makefile.build:250: /prebake/src/nvidia/nv.o] Error 1\n",
			failed, fault.Usage, "<kernel>/scripts/basic/fixdep: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not " +
				"found (required by <kernel>/scripts/basic/fixdep)"},
		{"no library", "/prebake/kernel/tools/objtool/objtool: error while loading shared libraries: libelf.so.1: cannot " +
			"open shared object file: No such file or directory\n", failed, fault.Usage,
			"<kernel>/tools/objtool/objtool: error while loading shared libraries: libelf.so.1: cannot open shared object " +
				"file: No such file or directory"},
		{"silent", "", failed, fault.Internal, "run make: exit status 2"},
		{"only words", "something odd\n", failed, fault.Internal, "run make: exit status 2: something odd"},
		{"warnings are no errors", "/prebake/src/a.c:7:1: warning: error: x\nerror: forwarding\n", failed, fault.Internal,
			"run make: exit status 2: error: forwarding"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			w := newWatch(io.Discard, func(string, int, int) {}, work{}, time.Now)
			if _, err := io.WriteString(w, row.log); err != nil {
				t.Fatal(err)
			}
			if err := w.close(true); err != nil {
				t.Fatal(err)
			}
			err := diagnose(row.err, w.findings)
			if fault.Of(err) != row.kind || err.Error() != row.text {
				t.Errorf("diagnose = %v: %v\nwant %v: %s", fault.Of(err), err, row.kind, row.text)
			}
			if fault.Hint(err) == "" {
				t.Errorf("diagnose = %v; want a hint", err)
			}
		})
	}
}

const quietMake = `make[1]: Entering directory '/prebake/kernel'
  SYMLINK /prebake/src/nvidia/nv-kernel.o
 CONFTEST: cc_sanity_check
 CONFTEST: linux/efi.h
 CONFTEST headers.h:
#define NV_LINUX_EFI_H_PRESENT
  CC [M]  /prebake/src/nvidia/nv.o
  CC [M]  /prebake/src/nvidia/nv-pci.o
  LD [M]  /prebake/src/nvidia.o
  CC [M]  /prebake/src/nvidia-uvm/uvm.o
  MODPOST /prebake/src/Module.symvers
  CC [M]  /prebake/src/nvidia.mod.o
  LD [M]  /prebake/src/nvidia.ko
  BTF [M] /prebake/src/nvidia.ko
make[1]: Leaving directory '/prebake/kernel'`

// TestWatch checks that the watch finds the same phases and progress, whether make's output arrives at once or in
// pieces.
func TestWatch(t *testing.T) {
	t.Parallel()
	for _, piece := range []int{1, 7, len(quietMake)} {
		var log strings.Builder
		var steps []string
		clock := time.Unix(1000, 0).UTC()
		w := newWatch(&log, func(phase string, done, total int) {
			steps = append(steps, fmt.Sprintf("%s %d/%d", phase, done, total))
			clock = clock.Add(time.Second)
		}, work{conftest: 2, compile: 2, link: 2}, func() time.Time { return clock })
		for rest := quietMake; rest != ""; {
			n := min(piece, len(rest))
			if _, err := io.WriteString(w, rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := w.close(false); err != nil {
			t.Fatal(err)
		}
		want := []string{"conftest 1/2", "conftest 2/2", "compile 1/2", "compile 2/2", "compile 3/3", "link 0/2", "link 1/2",
			"link 2/2"}
		if diff := cmp.Diff(want, steps); diff != "" {
			t.Errorf("in pieces of %d, progress differs (-want +got):\n%s", piece, diff)
		}
		at := func(s int64) time.Time { return time.Unix(s, 0).UTC() }
		phases := []timeline.Phase{
			{Name: "conftest", Start: at(1000), Seconds: 2, Note: "2 tests"},
			{Name: "compile", Start: at(1002), Seconds: 3, Note: "3 files"},
			{Name: "link", Start: at(1005), Seconds: 3, Note: "2 steps"},
		}
		if diff := cmp.Diff(phases, w.phases); diff != "" {
			t.Errorf("in pieces of %d, phases differ (-want +got):\n%s", piece, diff)
		}
		if log.String() != quietMake {
			t.Errorf("in pieces of %d, the log is not what was written", piece)
		}
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, errors.New("no more") }

// TestWatchLogTrouble checks a log that cannot be written. The build's output must go on, and close must return the
// log's error.
func TestWatchLogTrouble(t *testing.T) {
	t.Parallel()
	w := newWatch(fullDisk{}, func(string, int, int) {}, work{}, time.Now)
	if n, err := io.WriteString(w, quietMake); n != len(quietMake) || err != nil {
		t.Errorf("Write = %d, %v; want %d, nil", n, err, len(quietMake))
	}
	if err := w.close(false); err == nil {
		t.Error("close = nil; want the log's trouble")
	}
	if len(w.phases) != 3 {
		t.Errorf("%d phases; want 3", len(w.phases))
	}
}

func FuzzWatch(f *testing.F) {
	f.Add(quietMake)
	f.Add("make: *** [x] Error 1\n/prebake/src/a.c:1:1: error: x\n")
	f.Fuzz(func(t *testing.T, log string) {
		w := newWatch(io.Discard, func(_ string, done, total int) {
			if done > total {
				t.Errorf("progress %d of %d", done, total)
			}
		}, work{}, time.Now)
		if n, err := io.WriteString(w, log); n != len(log) || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
		if err := w.close(true); err != nil {
			t.Error(err)
		}
		if err := diagnose(&sandbox.ExitError{Status: 2}, w.findings); err == nil {
			t.Error("diagnose = nil")
		}
	})
}
