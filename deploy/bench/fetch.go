package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/target"
)

// fetching has the measurements of a node that fetches, verifies and stages a published driver. The registry is on
// loopback. The node fetches again after an update of its OS.
type fetching struct {
	curl, crane ratio
	delta       ratio     // bytes, in kB
	peak        []float64 // resident memory of the first install, in MiB
	idle        []float64 // resident memory of "fetcher run" on the updated node, in MiB
}

// fetch publishes a driver for two kernels in a registry, and installs it into folders that look like the roots of
// nodes.
func (b *bench) fetch(ctx context.Context) (err error) {
	m := &testbed.Mirror{Dir: b.mirror.Dir}
	srv, err := b.StartServer(ctx, filepath.Join(b.Dir, "server"), m)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, srv.Kill()) }()
	cells := []cell{
		{kernel: b.mirror.Builds[0], driver: b.mirror.Drivers[0].Version},
		{kernel: b.mirror.Builds[1], driver: b.mirror.Drivers[0].Version},
	}
	var layers []bundle.Layer
	for _, c := range cells { // these builds may use a cache that earlier builds filled, because they are not measured
		if layers, err = b.publish(ctx, srv, c); err != nil {
			return err
		}
	}
	for range b.runs {
		if err := b.fetchOnce(ctx, srv, cells, layers); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) publish(ctx context.Context, srv *testbed.Server, c cell) ([]bundle.Layer, error) {
	out, err := b.Must(
		ctx,
		"builder",
		"build",
		"--build-id",
		c.kernel.BuildID,
		"--board",
		c.kernel.Board,
		"--driver",
		c.driver,
		"--kernel-mirror",
		"file://"+filepath.Join(b.mirror.Dir, "cos"),
		"--driver-mirror",
		"file://"+filepath.Join(b.mirror.Dir, "drivers"),
		"--cache",
		filepath.Join(b.State, "build"),
		"--key",
		b.key,
		"--to",
		srv.Repository(),
		"--password",
		srv.Token,
		"--load-test",
		"off",
		"--output",
		"json",
	)
	if err != nil {
		return nil, err
	}
	var r result
	return r.Layers, json.Unmarshal(out, &r)
}

// fetchOnce measures two fresh nodes:
//   - One installs the driver for the newer kernel, cells[1]. fetchByHand then fetches the layers of that artifact.
//   - The other installs the driver for the older kernel, cells[0], and is then updated to the newer kernel.
//
// fetchOnce records the times, the fetcher's memory, and the number of bytes that the update fetched.
func (b *bench) fetchOnce(ctx context.Context, srv *testbed.Server, cells []cell, layers []bundle.Layer) error {
	root := filepath.Join(b.Dir, "fetch-node")
	defer os.RemoveAll(root)
	var r struct {
		FetchedBytes int64 `json:"fetchedBytes"`
	}
	for i, c := range []cell{cells[1], cells[0], cells[1]} {
		if i == 1 { // remove the first node: the second one starts with the older kernel, and is updated afterwards
			if err := os.RemoveAll(root); err != nil {
				return err
			}
		}
		if err := testbed.NodeRoot(root, c.kernel.Kernel); err != nil {
			return err
		}
		args := []string{
			"--registry", srv.Repository(), "--host-root", root, "--key", b.key + ".pub", "--driver", c.driver,
			"--flavour", string(target.Proprietary), "--no-load", "--builder", "never", "--output", "json",
		}
		cmd := exec.CommandContext(ctx, b.Program("fetcher"), append([]string{"install"}, args...)...)
		cmd.Stderr, cmd.SysProcAttr = b.Out, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		start := time.Now()
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("install the driver: %w", err)
		}
		seconds := time.Since(start).Seconds()
		if err := json.Unmarshal(out, &r); err != nil {
			return fmt.Errorf("read the result of \"fetcher install\": %w", err)
		}
		switch i {
		case 0:
			b.fetching.curl.ours, b.fetching.crane.ours = append(
				b.fetching.curl.ours,
				seconds,
			), append(
				b.fetching.crane.ours,
				seconds,
			)
			if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
				b.fetching.peak = append(b.fetching.peak, float64(usage.Maxrss)/1024) // in KiB, see getrusage(2)
			}
			if err := b.fetchByHand(ctx, srv, cells[1], layers); err != nil {
				return err
			}
		case 2:
			b.fetching.delta.ours = append(b.fetching.delta.ours, float64(r.FetchedBytes)/1e3)
			b.fetching.delta.theirs = append(b.fetching.delta.theirs, float64(layers[0].Size)/1e3)
			idle, err := b.watch(ctx, args)
			if err != nil {
				return err
			}
			b.fetching.idle = append(b.fetching.idle, idle)
		}
	}
	return nil
}

// watchTime is how long "fetcher run" watches before its memory is measured. The program checks the driver each second.
const watchTime = 10 * time.Second

// watch runs "fetcher run" on a node that has its driver, and returns the program's resident memory in MiB.
func (b *bench) watch(ctx context.Context, args []string) (mib float64, err error) {
	cmd := exec.CommandContext(ctx, b.Program("fetcher"), append([]string{"run", "--interval", "1s"}, args...)...)
	reported := make(reported, 1)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = reported, b.Out, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return 0, fmt.Errorf("watch the driver: \"fetcher run\" ended: %w", err)
	case <-reported:
	}
	defer func() { err = errors.Join(err, cmd.Process.Signal(syscall.SIGTERM), <-ended) }()
	select {
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-time.After(watchTime):
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "\nVmRSS:")
	var kib float64
	_, err = fmt.Sscanf(rest, "%f kB", &kib)
	return kib / 1024, err
}

// reported is a writer that reports its first use. "fetcher run" prints its report, and then watches the driver.
type reported chan struct{}

func (r reported) Write(p []byte) (int, error) {
	select {
	case r <- struct{}{}:
	default:
	}
	return len(p), nil
}

// fetchByHand fetches, hashes and unpacks an artifact's three layers in parallel with curl, sha256sum, zstd and tar,
// and then with crane. It records how many seconds each way takes.
func (b *bench) fetchByHand(ctx context.Context, srv *testbed.Server, c cell, layers []bundle.Layer) error {
	dir := filepath.Join(b.Dir, "by-hand")
	var script strings.Builder
	script.WriteString("set -e -o pipefail\n")
	for i, l := range layers {
		fmt.Fprintf(
			&script,
			"(mkdir -p %[1]s/%[2]d && curl -sf http://%[3]s/v2/prebake/driver/blobs/%[4]s | tee >(sha256sum > "+
				"%[1]s/%[2]d.sum) | zstd -dc | tar -x -C %[1]s/%[2]d) & p%[2]d=$!\n",
			dir,
			i,
			srv.Addr,
			l.Digest,
		)
	}
	script.WriteString("for p in $p0 $p1 $p2; do wait $p; done\n")
	seconds, err := b.runTimed(ctx, dir, "bash", "-c", script.String())
	if err != nil {
		return err
	}
	b.fetching.curl.theirs = append(b.fetching.curl.theirs, seconds)
	crane, err := craneProgram(ctx)
	if err != nil {
		return err
	}
	tag := bundle.KernelTag(c.kernel.Kernel, target.Driver{Version: c.driver, Flavour: target.Proprietary})
	seconds, err = b.runTimed(
		ctx,
		dir,
		"bash",
		"-c",
		fmt.Sprintf(
			"set -e -o pipefail; mkdir -p %[1]s; %[2]s export %[3]s:%[4]s - | tar -x -C %[1]s",
			dir,
			crane,
			srv.Repository(),
			tag,
		),
	)
	if err != nil {
		return err
	}
	b.fetching.crane.theirs = append(b.fetching.crane.theirs, seconds)
	return nil
}

// craneProgram builds crane in the version of go.mod, and returns its path.
func craneProgram(ctx context.Context) (string, error) {
	if out, err := exec.CommandContext(ctx, "go", "tool", "crane", "version").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build crane: %w: %s", err, out)
	}
	path, err := exec.CommandContext(ctx, "go", "tool", "-n", "crane").Output()
	if err != nil {
		return "", fmt.Errorf("find crane: %w", err)
	}
	return strings.TrimSpace(string(path)), nil
}

// runTimed runs a command that fills a folder, and removes the folder. It returns the seconds that the command took.
func (b *bench) runTimed(ctx context.Context, dir, name string, args ...string) (float64, error) {
	start := time.Now()
	err := b.command(ctx, name, args...)
	return time.Since(start).Seconds(), errors.Join(err, os.RemoveAll(dir))
}

func (b *bench) printFetch(out io.Writer) {
	f := &b.fetching
	for _, r := range []*ratio{&f.curl, &f.crane} {
		r.what, r.unit = "node: fetch, verify and stage from a registry on loopback", "s"
	}
	f.curl.alternative = "curl | tee >(sha256sum) | zstd -d | tar -x of the same three layers, side by side"
	f.crane.alternative = "crane export | tar -x"
	f.delta.what, f.delta.unit, f.delta.alternative =
		"bytes of an update to a sibling kernel, by delta", "kB", "the layer of modules"
	f.curl.print(out)
	f.crane.print(out)
	f.delta.print(out)
	if len(f.peak) > 0 {
		fmt.Fprintf(
			out,
			"        %.1f MiB peak resident memory of the install, with the program's own pages\n",
			median(f.peak),
		)
	}
	if len(f.idle) > 0 {
		fmt.Fprintf(out, "        %.1f MiB resident memory of \"fetcher run\" while it watches the driver\n", median(f.idle))
	}
}
