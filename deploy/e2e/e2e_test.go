// Package e2e runs Prebake's main job as an operator would, with the real programs, real kernels and real NVIDIA
// drivers. It uses only the programs' output, the API, the registry and the disk.
//
// The tests need the programs in bin/ and the Debian packages of `make setup`; run them with `make test`. With -short
// they do not run.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// stage has the parts that all tests share: one mirror, one server, one worker, one key.
type stage struct {
	*testbed.Scene
	mirror *testbed.Mirror
	key    string
	srv    *testbed.Server
	worker *testbed.Process
	passes *passes
	turns  *turns
}

var shared *stage // set by TestMain before any test runs, and not changed afterwards

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	for _, arg := range os.Args {
		if arg == "-test.short=true" {
			fmt.Println("e2e: left out with -short; run make test")
			return 0
		}
	}
	// TestInputs must run together with all tests that -run selects. Otherwise Go would cache their results without their
	// input files.
	flag.Parse()
	selected := flag.Lookup("test.run")
	whole := selected.Value.String() == ""
	if !whole {
		if err := selected.Value.Set("^TestInputs$|" + selected.Value.String()); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: -run:", err)
			return 1
		}
	}
	before, err := inputs.Look(suiteInputs...)
	var dir string
	if err == nil {
		dir, err = os.MkdirTemp("", "prebake-e2e-")
	}
	if err == nil {
		defer os.RemoveAll(dir)
		shared, err = setUp(context.Background(), dir)
	}
	if err == nil {
		var repo string
		if repo, err = filepath.Abs("../.."); err == nil {
			shared.passes, err = newPasses(context.Background(), repo, shared.mirror.Dir,
				filepath.Join(shared.State, "passed"), os.Environ(), testPrograms)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: set up:", err)
		return 1
	}
	defer func() {
		if err := errors.Join(shared.worker.Stop(), shared.srv.Stop()); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: tear down:", err)
			code = 1
		}
		if code != 0 {
			for _, name := range []string{"server.log", "worker.log"} {
				log, _ := os.ReadFile(filepath.Join(dir, name)) // only for the reader, so errors are ignored
				fmt.Fprintf(os.Stderr, "---- %s\n%s\n", name, log)
			}
		}
	}()
	shared.passes.off = whyAll(before, flag.CommandLine)
	// All parallel tests start, and then wait for their turns.
	if shared.turns, err = newTurns(); err == nil {
		err = flag.Set("test.parallel", "1000")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: set up:", err)
		return 1
	}
	code = m.Run()
	err = before.Unchanged()
	if err == nil {
		err = shared.passes.save(context.Background())
	}
	report, rerr := shared.passes.report(whole)
	fmt.Print(report)
	if err := errors.Join(err, rerr); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return code
}

// programsInBin are all programs in bin that tests run. bin may have more files.
var programsInBin = []string{"../../bin/builder", "../../bin/server", "../../bin/fetcher", "../../bin/nvmlprobe",
	"../../bin/guestinit", "../../bin/mirror"}

// suiteInputs are the files that the tests of this package depend on. They run the programs in bin, scripts, and the
// tests of other packages.
var suiteInputs = append([]string{"../../builder", "../../deploy", "../../fetcher", "../../pkg", "../../server",
	"../../docs", "../../README.md", "../../go.mod", "../../go.sum"}, programsInBin...)

// TestInputs tells Go's cache of test results on which files the tests of this package depend.
func TestInputs(t *testing.T) { inputs.Files(t, suiteInputs...) }

func setUp(ctx context.Context, dir string) (*stage, error) {
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(bin, "builder")); err != nil {
		return nil, fmt.Errorf("%w; run make build", err)
	}
	s, err := testbed.New(bin, dir, os.Stderr)
	if err != nil {
		return nil, err
	}
	st := &stage{Scene: s, key: filepath.Join(dir, "farm.key")}
	if st.mirror, err = s.Mirror(ctx); err != nil {
		return nil, err
	}
	if err := s.UseFastEmulator(ctx); err != nil {
		return nil, err
	}
	if _, err := s.Must(ctx, "builder", "keygen", st.key); err != nil {
		return nil, err
	}
	if st.srv, err = s.StartServer(ctx, filepath.Join(dir, "server"), st.mirror); err != nil {
		return nil, err
	}
	if st.worker, err = s.StartWorker(st.srv, st.mirror, st.key, s.BuildCache(), "--concurrency", "2"); err != nil {
		return nil, errors.Join(err, st.srv.Stop())
	}
	if os.Getenv(scenariosEnv) != "" { // TestNodeScenarios itself requests its builds, because their order matters
		return st, nil
	}
	// Most tests need these builds. They are requested together, because a load test uses only one processor, and another
	// build can use the others.
	for _, k := range []target.Kernel{st.kernel(0), st.kernel(1)} {
		for _, f := range []target.Flavour{target.Proprietary, target.Open} {
			_, err := st.srv.Client.RequestBuild(ctx,
				api.BuildRequest{BuildID: k.BuildID, Board: k.Board, Driver: st.driver(), Flavour: string(f)})
			if err != nil {
				return nil, errors.Join(err, st.worker.Stop(), st.srv.Stop())
			}
		}
	}
	return st, nil
}

// kernel returns the kernel of COS build n in the mirror. COS builds 0 and 1 have the two oldest kernels. Both flavours
// of the older driver compile for these kernels.
func (s *stage) kernel(n int) target.Kernel { return s.mirror.Builds[n].Kernel }

// driver returns the older driver version, which has both flavours.
func (s *stage) driver() string { return s.mirror.Drivers[0].Version }

// twin returns two COS builds of the mirror that have the same kernel. The first result has the higher BUILD_ID.
func (s *stage) twin(t *testing.T) (twin, of target.Kernel) {
	t.Helper()
	for _, a := range s.mirror.Builds {
		for _, b := range s.mirror.Builds {
			if a.BuildID > b.BuildID && a.Release == b.Release {
				return a.Kernel, b.Kernel
			}
		}
	}
	t.Fatal("the mirror has no two COS builds with the same kernel")
	return
}

// newest returns the newest kernel. The open flavour of the older driver does not compile for it.
func (s *stage) newest() target.Kernel {
	newest := s.mirror.Builds[0].Kernel
	for _, b := range s.mirror.Builds[1:] {
		if b.Release > newest.Release {
			newest = b.Kernel
		}
	}
	return newest
}

// build asks a server for a cell, and waits until the build has ended.
func build(t *testing.T, srv *testbed.Server, k target.Kernel, driver string, f target.Flavour) api.Build {
	t.Helper()
	b, err := srv.Client.RequestBuild(t.Context(),
		api.BuildRequest{BuildID: k.BuildID, Board: k.Board, Driver: driver, Flavour: string(f)})
	if err != nil {
		t.Fatalf("request %s %s-%s: %v", k, driver, f, err)
	}
	b, err = testbed.WaitBuild(t.Context(), srv.Client, b.ID,
		func(b api.Build) { t.Logf("build %d: %s %s", b.ID, b.State, b.Phase) })
	if err != nil {
		t.Fatalf("wait for build %d: %v", b.ID, err)
	}
	return b
}

// mustBuild works as build does, and fails the test unless the cell is published.
func mustBuild(t *testing.T, srv *testbed.Server, k target.Kernel, driver string, f target.Flavour) api.Build {
	t.Helper()
	b := build(t, srv, k, driver, f)
	if b.State != api.Published || b.Digest == "" {
		t.Fatalf("build %d of %s %s-%s is %s (%s): %s", b.ID, k, driver, f, b.State, b.Class, b.Error)
	}
	return b
}
