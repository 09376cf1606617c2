package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// states are the folders below the cache folder that the demo uses.
var states = []string{"mirror", "packages", "build", "demo"}

// fail prints why the demo failed, and keeps the logs of server and builder. The returned error has the kind of err.
func (d *demo) fail(ctx context.Context, err error, dir string) error {
	if ctx.Err() != nil {
		err = fault.New(fault.Cancelled, "interrupted", "")
	}
	fmt.Fprintf(d.out, "\nFAIL after %.0f s\n", time.Since(d.start).Seconds())
	row(d.out, "step", d.step)
	row(d.out, "reason", err.Error())
	if hint := fault.Hint(err); hint != "" {
		row(d.out, "hint", hint)
	}
	if d.scene != nil {
		for _, name := range []string{"server.log", "worker.log"} {
			raw, readErr := os.ReadFile(filepath.Join(dir, name))
			if readErr != nil {
				continue // the program was not started yet
			}
			kept := filepath.Join(d.scene.State, "demo", name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(kept), 0o755), os.WriteFile(kept, raw, 0o644)); err == nil {
				row(d.out, "log", kept)
			}
		}
	}
	return fault.New(fault.Of(err), "the demo failed: see the reason below FAIL", "")
}

// pass prints the phases with their durations, and what the run proved.
func (d *demo) pass() error {
	fmt.Fprintln(d.out, "\n== where the time went")
	tables := []struct {
		title  string
		phases []timeline.Phase
	}{{"builder", d.build.Phases}, {"builder, second kernel", d.second.Phases}, {"node", d.gpu.phases()}}
	for _, t := range tables {
		if len(t.phases) == 0 {
			continue
		}
		if err := timeline.Print(d.out, t.title, t.phases); err != nil {
			return err
		}
	}

	fmt.Fprintf(d.out, "\nPASS in %.0f s\n", time.Since(d.start).Seconds())
	fmt.Fprintln(d.out, "\nWhat this run proved")
	row(d.out, "build", fmt.Sprintf("NVIDIA's driver %s (%s) is compiled for the kernel\n"+
		"%s, checked against it, loaded once in a virtual machine, signed and published",
		d.version, d.flavour, d.kernel.Release))
	row(d.out, "artifact", d.srv.Repository()+"\n@"+d.build.Digest)
	if d.hasSibling() {
		row(d.out, "farm", "the driver is also published for the kernel "+d.sibling.Release+
			";\nthe builder reused the first build's results and recompiled at most a tenth")
	}
	row(d.out, "node", "a node that runs this kernel found the driver by its BUILD_ID, verified its\n"+
		"signatures, installed it, and loaded "+strings.Join(d.gpu.live, ", "))
	row(d.out, "NVML", "NVIDIA's library on the node talks to the modules, and answers version "+
		d.gpu.report.Verdict.NVML.Version)
	row(d.out, "no GPU", fmt.Sprintf("before the emulated GPU was put in, the node reported %q, exit status %d",
		d.bare.report.Verdict.State, d.bare.code))

	fmt.Fprintln(d.out, "\nWhat an emulated GPU cannot prove")
	row(d.out, "", fmt.Sprintf("The emulated GPU is a PCI device with nothing behind it. The driver finds it and\n"+
		"cannot start it, so the node reports %q with exit status %d: with this GPU the\n"+
		"right answer. That a program computes on a GPU, and how fast, has to be tried on a\n"+
		"machine that has one.", d.gpu.report.Verdict.State, d.gpu.code))

	fmt.Fprintln(d.out, "\nReused from earlier runs")
	for _, r := range d.reusedRows() {
		row(d.out, r[0], r[1])
	}

	sizes, total, err := sizes(d.scene.State)
	if err != nil {
		return err
	}
	fmt.Fprintln(d.out, "\nWhere its files are")
	row(d.out, "folder", fmt.Sprintf("%s, %s (%s)", d.scene.State, size(total), sizes))
	row(d.out, "remove", "make clean-cache, which empties the default cache of builder, too")
	return nil
}

// reusedRows returns what this run reused from earlier runs, as pairs of a name and a text.
func (d *demo) reusedRows() (rows [][2]string) {
	if d.mirror.Cached > 0 {
		all := d.mirror.Cached + d.mirror.Made
		rows = append(rows, [2]string{"mirror", fmt.Sprintf("%d of its %d objects", d.mirror.Cached, all)})
	}
	if phases := reusedPhases(d.build); len(phases) > 0 {
		rows = append(rows, [2]string{"builder", "results of the phases " + strings.Join(phases, ", ")})
	}
	if n := d.gpu.report.CachedBytes; n > 0 {
		rows = append(rows, [2]string{"node", size(n) + " of the driver, from the node's disk; all of it was verified again"})
	}
	if len(rows) == 0 {
		return [][2]string{{"", "nothing; a second run takes less time"}}
	}
	return append(rows, [2]string{"", "Each run signs and publishes, boots the node, and loads the modules."})
}

// suggest prints commands that the user can try while server and builder run.
func (d *demo) suggest() error {
	other := d.mirror.Builds[0].Kernel
	root := filepath.Join(d.scene.Dir, "node")
	if err := testbed.NodeRoot(root, d.kernel); err != nil {
		return err
	}
	ref := d.srv.Repository() + "@" + d.build.Digest
	server := " --server http://" + d.srv.Addr
	fmt.Fprintf(d.out, "\nServer and builder run until Ctrl-C. Open %s in a browser.\n", d.page())
	fmt.Fprintln(d.out, "Try in another terminal:")
	token := filepath.Join(d.srv.Data, "token")
	for _, try := range [][2]string{
		{"show the state of each cell", "server cells" + server},
		{"request the same driver for another kernel, and watch the build on the page",
			"server request" + server + " --token-file " + token + " --build-id " + other.BuildID +
				" --board " + other.Board + " --driver " + d.version + " --flavour proprietary --wait"},
		{"find the driver for this kernel as a node does", "fetcher resolve" + server + " --host-root " + root},
		{"verify the artifact as a node does",
			"fetcher verify --host-root " + root + " --public-key " + d.key + ".pub " + ref},
	} {
		fmt.Fprintf(d.out, "\n  # %s\n  %s\n", try[0], d.scene.Bin+"/"+try[1])
	}
	fmt.Fprintln(d.out)
	return nil
}

// row prints a name, and a text of one or more lines beside it.
func row(w interface{ Write([]byte) (int, error) }, name, text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintf(w, "  %-8s  %s\n", name, strings.TrimSuffix(line, "\n"))
		name = ""
	}
}

// sizes returns the disk space of the demo's folders: a text with each size, and the sum in bytes. A file with several
// hard links counts once.
func sizes(state string) (text string, total int64, err error) {
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	var parts []string
	for _, name := range states {
		var sum int64
		err := filepath.WalkDir(filepath.Join(state, name), func(_ string, e fs.DirEntry, err error) error {
			var info fs.FileInfo
			if err == nil {
				info, err = e.Info()
			}
			if errors.Is(err, fs.ErrNotExist) { // another builder may remove files at the same time
				return nil
			}
			if err != nil {
				return err
			}
			if st, ok := info.Sys().(*syscall.Stat_t); ok && !seen[inode{st.Dev, st.Ino}] {
				seen[inode{st.Dev, st.Ino}] = true
				sum += st.Blocks * 512 // st_blocks counts 512 bytes each, see stat(2)
			}
			return nil
		})
		if err != nil {
			return "", 0, fmt.Errorf("read the size of %s: %w", filepath.Join(state, name), err)
		}
		total += sum
		parts = append(parts, name+" "+size(sum))
	}
	return strings.Join(parts, ", "), total, nil
}

func size(n int64) string {
	if n >= 1<<30 {
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
}
