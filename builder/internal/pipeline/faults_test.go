package pipeline_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit/faulttable"
	"github.com/prebake/prebake/pkg/timeline"
)

var update = flag.Bool("update", false, "write docs/reference/faults.md anew")

// Each of these faults happens once at the start of each phase of a build.
const (
	faultKill    = "killed"
	faultDisk    = "disk full"
	faultNetwork = "network gone"
	faultCache   = "cache damaged"
)

var faults = []string{faultKill, faultDisk, faultNetwork, faultCache}

// order describes one build that runs in its own process. The process reads the order from the environment.
type order struct {
	Kernels, Drivers, Repo, Key, Cache string
	// Fault happens when Phase begins. If Text is not "", it happens when the load test's console prints Text instead. ""
	// means no fault.
	Fault, Phase, Text string
	// If Warm is not "", the process first runs a build with this load test mode for another destination, to fill the
	// cache.
	Warm pipeline.LoadTest
	// Parts are the folders of the cache whose files the fault damages. An empty list means all folders.
	Parts []string
	// Init and Probe are the programs for the load test.
	Init, Probe string
	// Control is a URL. A request to this URL cuts the network off.
	Control string
}

// outcome is the result that the build's process prints.
type outcome struct {
	Class  string // "" means success
	Error  string
	Digest string
	// Machines are the process ids of the virtual machines that ran when the build was killed.
	Machines []int
	// Again is the outcome of a second build in the same process. If the fault is a full disk, it runs after the disk has
	// free space again.
	Again *outcome
}

const orderVariable = "PREBAKE_TEST_ORDER"

// TestFaultProcess is no test of its own. It is the process in which a build with a fault runs. Without an order in the
// environment it does nothing.
func TestFaultProcess(t *testing.T) {
	raw := os.Getenv(orderVariable)
	if raw == "" {
		return
	}
	var o order
	if err := json.Unmarshal([]byte(raw), &o); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(os.TempDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if o.Warm != "" {
		before := o
		before.Fault, before.Repo = "", "oci:"+filepath.Join(filepath.Dir(o.Cache), "layout")
		if got := before.build(o.Warm); got.Class != "" {
			t.Fatalf("the build before: %+v", got)
		}
	}
	got := o.build(pipeline.LoadTestAuto)
	if o.Fault == faultDisk {
		if err := os.RemoveAll(filepath.Join(o.Cache, "filler")); err != nil {
			t.Fatal(err)
		}
		o.Fault = ""
		again := o.build(pipeline.LoadTestAuto)
		got.Again = &again
	}
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("OUTCOME %s\n", text)
}

func (o order) build(mode pipeline.LoadTest) (got outcome) {
	failed := func(err error) outcome {
		return outcome{Class: fault.Of(err).String(), Error: err.Error()}
	}
	cache, err := cas.Open(o.Cache)
	if err != nil {
		return failed(err)
	}
	defer func() {
		if err := cache.Close(); err != nil && got.Class == "" {
			got = failed(err)
		}
	}()
	var struck error
	strike := func() { struck = errors.Join(struck, o.strike()) }
	line := &timeline.Run{Watch: func(e timeline.Event) {
		if o.Text == "" && e.Phase == o.Phase && e.Done == nil && e.Text == "" {
			strike()
		}
	}}
	log := io.Discard
	if o.Text != "" {
		log = &alarm{text: []byte(o.Text), ring: strike}
	}
	res, err := pipeline.Run(context.Background(), pipeline.Config{
		KernelMirror: o.Kernels, DriverMirror: o.Drivers, Cache: cache, Destinations: []string{o.Repo}, Key: o.Key,
		BuilderID: "https://example.com/builder", Version: "test", Jobs: 1, LoadTest: mode, MinFree: 1 << 20,
		GuestInit: o.Init, NVMLProbe: o.Probe,
	}, request("17800.0.9"), log, line)
	if struck != nil {
		return outcome{Class: "strike", Error: struck.Error()}
	}
	if err != nil {
		return failed(err)
	}
	return outcome{Digest: res.Digest}
}

func (o order) strike() error {
	switch o.Fault {
	case faultKill:
		if err := tellMachines(); err != nil {
			return err
		}
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	case faultDisk:
		return faulttable.Fill(filepath.Join(o.Cache, "filler"))
	case faultNetwork:
		resp, err := http.Get(o.Control)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	case faultCache:
		return damage(o.Cache, o.Parts)
	}
	return nil
}

// damage flips one bit in every file below the given folders of the cache. If parts is empty, it does so in all
// folders. If it finds no file, it returns an error.
func damage(dir string, parts []string) error {
	changed := 0
	all := parts
	if len(parts) == 0 {
		all = []string{"trees", "blobs", "facts", "seals"}
	}
	for _, part := range all {
		err := filepath.WalkDir(filepath.Join(dir, part), func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if err != nil || len(data) == 0 {
				return err
			}
			data[len(data)/2] ^= 1
			// A failing disk changes the file itself, so a process that has the file open sees the change.
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.Write(data)
			changed++
			return errors.Join(err, f.Close())
		})
		if err != nil {
			return err
		}
	}
	if changed == 0 && len(parts) > 0 {
		return fmt.Errorf("there is nothing to damage in %v", parts)
	}
	return nil
}

// wire is the network between a build and its servers. A test can cut the network off, and can set a function that runs
// before each write to the registry.
type wire struct {
	*httptest.Server
	down    atomic.Bool
	writes  atomic.Int64
	trigger atomic.Pointer[func(write int64)]
}

func newWire(t *testing.T, f *farm) *wire {
	t.Helper()
	repo, err := name.NewRepository(f.repo)
	if err != nil {
		t.Fatal(err)
	}
	registry := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: repo.RegistryStr()})
	registry.ErrorHandler = func(http.ResponseWriter, *http.Request, error) {} // killed clients cause errors
	files := http.FileServer(http.Dir(f.dir))
	w := &wire{}
	w.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/control/down":
			w.down.Store(true)
		case w.down.Load():
			panic(http.ErrAbortHandler)
		case !strings.HasPrefix(r.URL.Path, "/v2/"):
			files.ServeHTTP(rw, r)
		default:
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				n := w.writes.Add(1)
				if pull := w.trigger.Load(); pull != nil {
					(*pull)(n)
				}
			}
			registry.ServeHTTP(rw, r)
		}
	}))
	t.Cleanup(w.Close)
	return w
}

// theatre is a farm in which one test causes one fault.
type theatre struct {
	f    *farm
	wire *wire
	disk string // the folder of the cache
	tmp  string // the folder for temporary files
	order
}

func newTheatre(t *testing.T, f *farm) *theatre {
	t.Helper()
	w := newWire(t, f)
	host := strings.TrimPrefix(w.URL, "http://")
	disk := t.TempDir()
	return &theatre{f: f, wire: w, disk: disk, tmp: filepath.Join(disk, "tmp"), order: order{
		Kernels: w.URL + "/cos", Drivers: w.URL + "/drivers", Repo: host + "/prebake/driver", Key: f.key,
		Cache: filepath.Join(disk, "cache"), Control: w.URL + "/control/down",
	}}
}

// process returns the command that runs a build in its own process. If the fault is a full disk, the process has a
// small disk of its own.
func (th *theatre) process(t *testing.T, fault, phase string) *exec.Cmd {
	t.Helper()
	th.Fault, th.Phase = fault, phase
	text, err := json.Marshal(th.order)
	if err != nil {
		t.Fatal(err)
	}
	argv := []string{os.Args[0], "-test.run=^TestFaultProcess$"}
	if fault == faultDisk {
		argv = append([]string{"bwrap", "--dev-bind", "/", "/", "--size", strconv.Itoa(256 << 20), "--tmpfs", th.disk,
			"--die-with-parent", "--"}, argv...)
	}
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), orderVariable+"="+string(text), "TMPDIR="+th.tmp)
	return cmd
}

// killed is the class of a build that was killed. Such a build cannot report the class of an error.
const killed = "killed"

func (th *theatre) run(t *testing.T, fault, phase string) *outcome {
	t.Helper()
	return runProcess(t, th.process(t, fault, phase), func() {})
}

// runProcess starts a build and then calls started. It waits for the build's end, and returns the outcome that the
// build printed.
func runProcess(t *testing.T, cmd *exec.Cmd, started func()) *outcome {
	t.Helper()
	var buffer bytes.Buffer
	cmd.Stdout = &buffer
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	started()
	err := cmd.Wait()
	out := buffer.Bytes()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled() {
		return &outcome{Class: killed, Machines: machinesIn(t, out)}
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	_, text, ok := bytes.Cut(out, []byte("OUTCOME "))
	text, _, _ = bytes.Cut(text, []byte("\n"))
	got := &outcome{}
	if !ok || json.Unmarshal(text, got) != nil {
		t.Fatalf("no outcome in %q", out)
	}
	return got
}

// tags returns the digest to which each tag in the registry points.
func (th *theatre) tags(t *testing.T) map[string]string {
	t.Helper()
	repo, err := name.NewRepository(th.f.repo)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	list, err := remote.List(repo)
	if err != nil {
		return all // the registry is empty
	}
	for _, tag := range list {
		desc, err := remote.Head(repo.Tag(tag))
		if err != nil {
			t.Fatal(err)
		}
		all[tag] = desc.Digest.String()
	}
	return all
}

// checkAfterwards checks that each tag points at the right artifact, and that the next build succeeds. If the next
// build has run already, again is its outcome.
func (th *theatre) checkAfterwards(t *testing.T, want string, again *outcome) {
	t.Helper()
	for tag, digest := range th.tags(t) {
		if digest != want {
			t.Errorf("after the fault, tag %s points at %s; want %s or no tag", tag, digest, want)
		}
	}
	th.wire.down.Store(false)
	if again == nil {
		th.Warm = ""
		again = th.run(t, "", "")
	}
	if again.Class != "" || again.Digest != want {
		t.Fatalf("after the restart: %+v; want %s", again, want)
	}
	tags := th.tags(t)
	if len(tags) != 2 {
		t.Errorf("after the restart the tags are %v; want two", tags)
	}
	for tag, digest := range tags {
		if digest != want {
			t.Errorf("after the restart, tag %s points at %s; want %s", tag, digest, want)
		}
	}
}

// buildUnderFault builds with a fault, and then without one. It returns the class of the first build's error, or
// "published". want is the digest of the right artifact.
func (th *theatre) buildUnderFault(t *testing.T, kind, phase, want string) string {
	t.Helper()
	got := th.run(t, kind, phase)
	if (got.Class == killed) != (kind == faultKill) {
		t.Fatalf("the build ended with %+v", got)
	}
	cell := got.Class
	if cell == "" {
		cell = "published"
		if got.Digest != want {
			t.Errorf("published %s; want %s", got.Digest, want)
		}
	}
	t.Logf("%s: %s", cell, got.Error)
	if want := kind == faultKill && th.Text != ""; (len(got.Machines) == 1) != want {
		t.Errorf("machines %v ran when it was killed", got.Machines)
	}
	for _, pid := range got.Machines {
		checkKilled(t, pid)
	}
	th.checkAfterwards(t, want, got.Again)
	return cell
}

// referenceDigest returns the digest of the artifact from a build without faults.
func referenceDigest(t *testing.T) string {
	t.Helper()
	got := newTheatre(t, newFarm(t)).run(t, "", "")
	if got.Digest == "" {
		t.Fatalf("without a fault: %+v", got)
	}
	return got.Digest
}

// TestFaults causes every fault at the start of every phase. No wrong artifact may be published, the error must have
// the right class, and the next build must succeed. The results must be those in the table of docs/reference/faults.md.
func TestFaults(t *testing.T) {
	t.Parallel()
	want := referenceDigest(t)
	var mu sync.Mutex
	seen := map[string]string{}
	t.Run("strike", func(t *testing.T) {
		for _, phase := range whole {
			for _, kind := range faults {
				t.Run(phase+" "+kind, func(t *testing.T) {
					t.Parallel()
					th := newTheatre(t, newFarm(t))
					cell := th.buildUnderFault(t, kind, phase, want)
					mu.Lock()
					defer mu.Unlock()
					seen[phase+" "+kind] = cell
				})
			}
		}
	})
	if !t.Failed() {
		checkTable(t, "", "phase", whole, seen)
	}
}

// TestKilledWhilePublishing kills the build with SIGKILL at its n-th write to the registry, for every n. The next build
// must publish the right artifact.
func TestKilledWhilePublishing(t *testing.T) {
	t.Parallel()
	want := referenceDigest(t)
	count := func() int64 {
		th := newTheatre(t, newFarm(t))
		th.run(t, "", "")
		return th.wire.writes.Load()
	}()
	if count < 10 {
		t.Fatalf("a whole build makes %d writes to the registry; that is too few to be true", count)
	}
	for at := range count {
		t.Run(fmt.Sprintf("write %d of %d", at+1, count), func(t *testing.T) {
			t.Parallel()
			th := newTheatre(t, newFarm(t))
			cmd := th.process(t, "", "")
			started := make(chan struct{})
			pull := func(n int64) {
				if n == at+1 {
					<-started
					_ = cmd.Process.Kill() // an error means that the build has ended already
				}
			}
			th.wire.trigger.Store(&pull)
			if got := runProcess(t, cmd, func() { close(started) }); got.Class != killed && got.Digest != want {
				t.Errorf("the build was not killed, and ended with %+v", got)
			}
			th.wire.trigger.Store(nil)
			th.checkAfterwards(t, want, nil)
		})
	}
}
