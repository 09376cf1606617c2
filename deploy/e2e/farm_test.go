package e2e

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// manifest reads an artifact's manifest from a server's registry, as any OCI client would.
func manifest(t *testing.T, srv *testbed.Server, digest string) *v1.Manifest {
	t.Helper()
	ref, err := name.NewDigest(srv.Repository() + "@" + digest)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatalf("read %s: %v", ref, err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func layer(t *testing.T, m *v1.Manifest, kind bundle.LayerKind) v1.Descriptor {
	t.Helper()
	for _, l := range m.Layers {
		if l.Annotations[bundle.AnnotationLayer] == string(kind) {
			return l
		}
	}
	t.Fatalf("manifest has no %s layer", kind)
	return v1.Descriptor{}
}

// TestMatrixSharesUserspace builds both flavours for two kernels. The four artifacts must share the layers of user
// space and firmware.
func TestMatrixSharesUserspace(t *testing.T) {
	modules := map[string]string{}
	user, firmware := map[string]bool{}, map[string]bool{}
	for _, k := range []target.Kernel{shared.kernel(0), shared.kernel(1)} {
		for _, f := range []target.Flavour{target.Proprietary, target.Open} {
			b := mustBuild(t, shared.srv, k, shared.driver(), f)
			m := manifest(t, shared.srv, b.Digest)
			l := layer(t, m, bundle.LayerModules)
			if other, ok := modules[l.Digest.String()]; ok {
				t.Errorf("%s %s has the modules of %s", k, f, other)
			}
			modules[l.Digest.String()] = k.String() + " " + string(f)
			user[layer(t, m, bundle.LayerUserspace).Digest.String()] = true
			firmware[layer(t, m, bundle.LayerFirmware).Digest.String()] = true
		}
	}
	if len(user) != 1 || len(firmware) != 1 {
		t.Errorf("four artifacts have %d user space and %d firmware layers; want one each", len(user), len(firmware))
	}
}

// TestTwinBuildSharesArtifact checks that a second COS build with the same kernel gets the artifact of the first one.
// The server must offer this artifact to nodes of both COS builds.
func TestTwinBuildSharesArtifact(t *testing.T) {
	t.Parallel()
	defer shared.turns.take(5)()
	twin, of := shared.twin(t)
	first := mustBuild(t, shared.srv, of, shared.driver(), target.Proprietary)
	second := mustBuild(t, shared.srv, twin, shared.driver(), target.Proprietary)
	if first.Digest != second.Digest {
		t.Errorf("%s got %s, and %s, with the same kernel, got %s; want one artifact", of, first.Digest, twin, second.Digest)
	}
	for _, k := range []target.Kernel{twin, of} {
		r, err := shared.srv.Client.Resolve(t.Context(),
			api.Question{BuildID: k.BuildID, Board: k.Board, Driver: shared.driver(), Flavour: string(target.Proprietary)})
		if err != nil || r.State != api.Published || r.Digest != first.Digest {
			t.Errorf("resolve %s = %s %s, %v; want %s", k, r.State, r.Digest, err, first.Digest)
		}
	}
}

// TestKilledBuilderReproduces kills a builder with a cache of its own in the middle of a compile. After a restart it
// must finish the build. The result must be identical to the artifact of the shared worker. The cache has the inputs
// and the answers of conftest, but nothing that was compiled. TestReproduce asks conftest again.
func TestKilledBuilderReproduces(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher/nvmlprobe") {
		return
	}
	defer shared.turns.take(150)()
	k := shared.kernel(1)
	want := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)

	dir := t.TempDir()
	cache := linkCache(t, "driver-", "headers-", "toolchain-", "fetched-", "tree-digest-", "header-view-", "conftest-")
	s, err := testbed.New(shared.Bin, dir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := s.StartServer(t.Context(), filepath.Join(dir, "another", "server"), shared.mirror)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Stop()
	start := func() *testbed.Process {
		w, err := s.StartWorker(srv, shared.mirror, shared.key, cache)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	worker := start()
	b, err := srv.Client.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: k.BuildID, Board: k.Board, Driver: shared.driver(), Flavour: string(target.Proprietary)})
	if err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(cache, "work")
	deadline := time.Now().Add(10 * time.Minute)
	for objects(work) < 5 {
		if time.Now().After(deadline) {
			t.Fatal("no object was compiled in 10 minutes")
		}
		time.Sleep(200 * time.Millisecond)
	}
	if err := worker.Kill(); err != nil {
		t.Fatal(err)
	}
	if got, err := srv.Client.Artifacts(t.Context()); err != nil || len(got) != 0 {
		t.Fatalf("after the kill the catalogue has %d artifacts, %v; want none", len(got), err)
	}
	worker = start()
	defer worker.Stop()
	b, err = testbed.WaitBuild(t.Context(), srv.Client, b.ID,
		func(b api.Build) { t.Logf("build %d: %s %s", b.ID, b.State, b.Phase) })
	if err != nil || b.State != api.Published {
		log, _ := os.ReadFile(filepath.Join(dir, "worker.log"))
		t.Fatalf("after the restart: build is %s (%s) %s, %v\n%s", b.State, b.Class, b.Error, err, log)
	}
	if b.Digest != want.Digest {
		t.Errorf("built again in another folder: %s; want %s", b.Digest, want.Digest)
	}
	artifacts, err := srv.Client.Artifacts(t.Context())
	if err != nil || len(artifacts) != 1 {
		t.Errorf("the catalogue has %d artifacts, %v; want exactly one", len(artifacts), err)
	}
	repo, err := name.NewRepository(srv.Repository())
	if err != nil {
		t.Fatal(err)
	}
	tags, err := remote.List(repo)
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range tags {
		desc, err := remote.Head(repo.Tag(tag))
		if err != nil || desc.Digest.String() != want.Digest {
			t.Errorf("tag %s names %v, %v; want %s", tag, desc, err, want.Digest)
		}
	}
}

// objects returns the number of compiled objects below a builder's work folder. It ignores errors, because files appear
// and disappear during the walk.
func objects(dir string) (n int) {
	_ = filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".o") && strings.Contains(path, "nvidia") {
			n++
		}
		return nil
	})
	return n
}

// TestHonestFailures checks that API and command line report a failed build's class, first error line and log.
func TestHonestFailures(t *testing.T) {
	t.Parallel()
	defer shared.turns.take(10)()
	broken := corruptHeaders(t, shared.mirror, shared.kernel(0))
	dir := t.TempDir()
	s, err := testbed.New(shared.Bin, dir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	brokenServer, err := s.StartServer(t.Context(), filepath.Join(dir, "server"), broken)
	if err != nil {
		t.Fatal(err)
	}
	defer brokenServer.Stop()
	brokenWorker, err := s.StartWorker(brokenServer, broken, shared.key, filepath.Join(dir, "cache"))
	if err != nil {
		t.Fatal(err)
	}
	defer brokenWorker.Stop()

	rows := []struct {
		name    string
		srv     *testbed.Server
		kernel  target.Kernel
		driver  string
		flavour target.Flavour
		class   fault.Kind
		text    []string // each must be in the build's error
		log     string   // must be in the log
	}{
		{"unknown driver version", shared.srv, shared.kernel(0), "535.999.99", target.Proprietary, fault.InputMissing,
			[]string{"535.999.99"}, "535.999.99"},
		{"headers with a wrong checksum", brokenServer, shared.kernel(0), shared.driver(), target.Proprietary, fault.Checksum,
			[]string{"kernel-headers.tgz"}, "kernel-headers.tgz"},
		{"driver too old for the kernel", shared.srv, shared.newest(), shared.driver(), target.Open, fault.APIBreak,
			[]string{"nv-pci.c", "pci_resize_resource"}, "too few arguments to function"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			b := build(t, row.srv, row.kernel, row.driver, row.flavour)
			if b.State != api.Failed || b.Class != row.class.String() {
				t.Fatalf("build is %s (%s): %s; want failed (%s)", b.State, b.Class, b.Error, row.class)
			}
			for _, text := range row.text {
				if !strings.Contains(b.Error, text) {
					t.Errorf("error %q does not name %q", b.Error, text)
				}
			}
			log, err := row.srv.Client.BuildLog(t.Context(), b.ID)
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			raw, err := io.ReadAll(log)
			if err != nil || !strings.Contains(string(raw), row.log) {
				t.Errorf("log through the API (%d bytes, %v) does not hold %q", len(raw), err, row.log)
			}
			server := "http://" + row.srv.Addr
			out, err := shared.Must(t.Context(), "server", "build", "--server", server, itoa(b.ID))
			if err != nil || !strings.Contains(string(out), row.class.String()) {
				t.Errorf("server build = %q, %v; want class %s", out, err, row.class)
			}
			out, err = shared.Must(t.Context(), "server", "build", "--server", server, "--log", itoa(b.ID))
			if err != nil || !strings.Contains(string(out), row.log) {
				t.Errorf("server build --log (%d bytes, %v) does not hold %q", len(out), err, row.log)
			}
			r, err := row.srv.Client.Resolve(t.Context(),
				api.Question{BuildID: row.kernel.BuildID, Board: row.kernel.Board, Driver: row.driver,
					Flavour: string(row.flavour)})
			if err != nil || r.State != api.Failed {
				t.Errorf("resolve = %s (%s), %v; want failed", r.State, r.Reason, err)
			}
		})
	}
}

// corruptHeaders returns a copy of the mirror in which the header archive of one build does not match its checksum.
func corruptHeaders(t *testing.T, m *testbed.Mirror, k target.Kernel) *testbed.Mirror {
	t.Helper()
	copied := *m
	copied.Dir = t.TempDir()
	err := filepath.WalkDir(m.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(m.Dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(copied.Dir, rel), 0o755)
		}
		return os.Link(path, filepath.Join(copied.Dir, rel))
	})
	if err != nil {
		t.Fatal(err)
	}
	headers := filepath.Join(copied.Dir, "cos", k.BuildID, k.Board, "kernel-headers.tgz")
	raw, err := os.ReadFile(headers)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.Remove(headers); err != nil { // this removes the hard link only, so that the original file is not changed
		t.Fatal(err)
	}
	if err := os.WriteFile(headers, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	return &copied
}

// TestStockCrane checks that the standard crane program pulls an artifact from the embedded registry and from another
// one.
func TestStockCrane(t *testing.T) {
	t.Parallel()
	defer shared.turns.take(15)()
	k := shared.kernel(1)
	b := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	second := craneRegistry(t) + "/drivers/nvidia"
	if _, err := shared.Must(t.Context(), "builder", "build", "--build-id", k.BuildID, "--board", k.Board, "--driver",
		shared.driver(),
		"--kernel-mirror", shared.mirror.KernelURL(), "--driver-mirror", shared.mirror.DriverURL(),
		"--cache", shared.BuildCache(), "--key", shared.key, "--to", second); err != nil {
		t.Fatal(err)
	}
	for _, repo := range []string{shared.srv.Repository(), second} {
		ref := repo + "@" + b.Digest
		crane(t, "validate", "--fast", "--remote", ref) // without --fast, crane reads the layers, which must be gzip
		out := filepath.Join(t.TempDir(), "image.tar")
		crane(t, "pull", "--format=oci", ref, out)
		if info, err := os.Stat(filepath.Join(out, "index.json")); err != nil || info.Size() == 0 {
			t.Errorf("crane pull %s left no layout: %v", ref, err)
		}
		if got := strings.TrimSpace(crane(t, "digest",
			repo+":"+bundle.KernelTag(k,
				target.Driver{Version: shared.driver(), Flavour: target.Proprietary}))); got != b.Digest {
			t.Errorf("the kernel's tag in %s names %s; want %s", repo, got, b.Digest)
		}
	}
}

func crane(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"tool", "crane"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("crane %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// craneRegistry starts crane's own registry on loopback. The registry itself chooses a free port. A port that the test
// chose could be taken by another test before the registry starts.
func craneRegistry(t *testing.T) string {
	t.Helper()
	crane(t, "version") // builds crane
	path, err := exec.CommandContext(t.Context(), "go", "tool", "-n", "crane").Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(strings.TrimSpace(string(path)), "registry", "serve", "--address", "127.0.0.1:0", "--disk",
		t.TempDir())
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // the registry has no other way to end
		_ = cmd.Wait()
	})
	// The registry prints its port when it listens.
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if _, port, ok := strings.Cut(lines.Text(), "serving on port "); ok {
			go func() { _, _ = io.Copy(io.Discard, stderr) }() // so that a full pipe never blocks the registry
			return "127.0.0.1:" + port
		}
	}
	t.Fatal("crane's registry did not start")
	return ""
}
