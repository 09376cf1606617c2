package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// TestReleaseToNode runs the way from a COS release to a node without manual steps. A COS build appears in the mirror
// and is announced. The server plans both flavours of a wish list, and two builders build one flavour each. A node that
// asked before anything was published gets its driver. The same node then runs the command of a page, and changes its
// flavour, with the drivers of the shared server.
func TestReleaseToNode(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher") {
		return
	}
	defer shared.turns.take(70)()
	k := shared.kernel(1)
	proprietary := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	open := mustBuild(t, shared.srv, k, shared.driver(), target.Open)
	command := nodeCommand(t, k, shared.driver(), target.Proprietary)
	dir := t.TempDir()
	s, err := testbed.New(shared.Bin, dir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	mirror := *shared.mirror
	mirror.Dir = filepath.Join(dir, "mirror")
	link(t, filepath.Join(shared.mirror.Dir, "drivers"), filepath.Join(mirror.Dir, "drivers"))
	link(t, filepath.Join(shared.mirror.Dir, "cos", shared.kernel(0).BuildID),
		filepath.Join(mirror.Dir, "cos", shared.kernel(0).BuildID))
	srv, err := s.StartServer(t.Context(), filepath.Join(dir, "server"), &mirror)
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Stop()

	// The wish list names the COS build before the mirror has it.
	text := fmt.Sprintf("version: 1\nkernels: [{build: %s, board: %s}]\ndrivers: [default]\nflavours: [proprietary, "+
		"open]\n", k.BuildID, k.Board)
	if _, err := srv.Client.PutWishList(t.Context(), "story", api.NewWishList{Text: text}); err != nil {
		t.Fatal(err)
	}
	if all, err := srv.Client.Builds(t.Context(), ""); err != nil || len(all) != 0 {
		t.Fatalf("before the release there are %d builds, %v; want none", len(all), err)
	}
	link(t, filepath.Join(shared.mirror.Dir, "cos", k.BuildID), filepath.Join(mirror.Dir, "cos", k.BuildID))
	release, err := srv.Client.Announce(t.Context(), k.BuildID)
	if err != nil || len(release.Cells) != 2 || release.Open != 2 || release.Ready != 0 {
		t.Fatalf("Announce() = %+v, %v; want two open cells", release, err)
	}
	again, err := srv.Client.Announce(t.Context(), k.BuildID)
	if err != nil || len(again.Cells) != 2 || !again.SeenAt.Equal(release.SeenAt) {
		t.Errorf("Announce() again = %+v, %v; want what it was", again, err)
	}

	// The builders start only after the node has asked for its driver.
	boot, err := shared.Boot(t.Context(), shared.mirror, k)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var res *vm.Result
	done := make(chan error, 1)
	go func() {
		var err error
		res, err = s.RunNode(ctx,
			testbed.Node{Kernel: k, Boot: boot, GPU: true, Key: shared.key + ".pub", Timeout: 30 * time.Minute},
			append([]vm.Step{waitStep(srv), testbed.ModulesStep()}, flavourSteps(command)...))
		done <- err
	}()
	waitAsked(t, srv, done)
	for _, id := range []string{"first", "second"} {
		own := *s
		own.Dir = filepath.Join(dir, id)
		if err := os.MkdirAll(own.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		w, err := own.StartWorker(srv, &mirror, shared.key, s.BuildCache(), "--id", id)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
	}
	var builders []string
	digests := map[string]target.Flavour{}
	for _, c := range release.Cells {
		b, err := testbed.WaitBuild(t.Context(), srv.Client, c.Build.ID,
			func(b api.Build) { t.Logf("build %d: %s %s %s", b.ID, b.Worker, b.State, b.Phase) })
		if err != nil || b.State != api.Published {
			t.Fatalf("build %d of %s is %s (%s): %s, %v; want published", b.ID, b.Driver, b.State, b.Class, b.Error, err)
		}
		builders = append(builders, b.Worker)
		digests[b.Digest] = b.Driver.Flavour
	}
	slices.Sort(builders)
	if !slices.Equal(builders, []string{"first", "second"}) || len(digests) != 2 {
		t.Errorf("%v made %v; want one artifact of each builder", builders, digests)
	}

	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Run("first driver", func(t *testing.T) { node(t, res, digests) })
	t.Run("flavours", func(t *testing.T) { checkFlavours(t, res, proprietary.Digest, open.Digest) })
	release, err = srv.Client.Release(t.Context(), k.BuildID)
	if err != nil || release.Ready != 2 || release.Open != 0 || release.Times.Count != 2 || release.Times.P50 <= 0 ||
		release.Times.Max < release.Times.P50 {
		t.Fatalf("Release() = %+v, %v; want two cells that are ready, with times", release, err)
	}
	for _, c := range release.Cells {
		if c.ReadyAt == nil || !c.ReadyAt.After(release.SeenAt) ||
			c.ReadyAt.Sub(release.SeenAt).Seconds() > release.Times.Max+1 {
			t.Errorf("%s is ready at %v; want a time after %v, %v s at most", c.Driver, c.ReadyAt, release.SeenAt,
				release.Times.Max)
		}
	}
	t.Logf("from release to ready: %+v", release.Times)
}

// waitStep returns a step that waits until COS's default driver is published, and installs it.
func waitStep(srv *testbed.Server) vm.Step {
	step := testbed.InstallStep(srv, "--wait", "15m", "--builder", "never")
	step.Timeout = 16 * time.Minute
	return step
}

// answeredMetric matches the metric of answered requests for /v1/resolve in the server's metrics, if it is not 0. Only
// nodes send these requests.
var answeredMetric = regexp.MustCompile(`(?m)^prebake_http_request_seconds_count\{[^}]*/v1/resolve[^}]*\} [1-9]`)

// waitAsked returns when a node has asked the server. The test fails if done first reports that the node has ended.
func waitAsked(t *testing.T, srv *testbed.Server, done <-chan error) {
	t.Helper()
	for {
		resp, err := http.Get("http://" + srv.Addr + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(resp.Body)
		if cerr := resp.Body.Close(); err != nil || cerr != nil {
			t.Fatal(err, cerr)
		}
		if answeredMetric.Match(raw) {
			return
		}
		select {
		case err := <-done:
			t.Fatalf("the node ended before it asked: %v", err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// node checks the result on the node: one of the artifacts is installed, and its modules are in the kernel.
func node(t *testing.T, res *vm.Result, digests map[string]target.Flavour) {
	t.Helper()
	step, err := testbed.StepNamed(res, "install")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the node: exit %d, %.1f s\n%s%s", step.ExitCode, step.Seconds, step.Stdout, step.Stderr)
	var r testbed.Report
	if err := testbed.Decode(step, &r); err != nil {
		t.Fatal(err)
	}
	if want := fault.Unusable.ExitCode(); step.ExitCode != want || digests[r.Verdict.Digest] == "" {
		t.Errorf("the node ended with %d and has %s; want %d and one of %v", step.ExitCode, r.Verdict.Digest, want, digests)
	}
	if step, err = testbed.StepNamed(res, testbed.ModulesStep().Name); err != nil ||
		!slices.Contains(testbed.Live(step.Stdout), "nvidia") {
		t.Errorf("live in the node: %v, %v; want nvidia among them", testbed.Live(step.Stdout), err)
	}
}

// link copies a folder: it makes new folders with hard links to the files. A file that is added to the copy does not
// appear in the original.
func link(t *testing.T, from, to string) {
	t.Helper()
	linkFiles(t, from, to, false)
}

// linkFiles copies a folder with hard links. If gone is true, a file or folder may be removed meanwhile.
func linkFiles(t *testing.T, from, to string, gone bool) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if gone && errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		err = os.Link(path, filepath.Join(to, rel))
		if gone && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// linkCache returns a new cache that has all blobs of the shared build cache, and its trees and facts of those kinds
// whose names begin with one of the words. The files are hard links. A builder writes only new files to its cache, so
// the shared one does not change.
func linkCache(t *testing.T, words ...string) string {
	t.Helper()
	from, to := shared.BuildCache(), filepath.Join(t.TempDir(), "cache")
	names := []string{"blobs"}
	// The seals come after the trees, because a tree without a seal counts as damaged.
	for _, folder := range []string{"trees", "seals", "facts"} {
		kinds, err := os.ReadDir(filepath.Join(from, folder))
		if err != nil {
			t.Fatal(err)
		}
		for _, kind := range kinds {
			if slices.ContainsFunc(words, func(word string) bool { return strings.HasPrefix(kind.Name(), word) }) {
				names = append(names, filepath.Join(folder, kind.Name()))
			}
		}
	}
	for _, name := range names { // other builds of this run may remove old entries meanwhile
		linkFiles(t, filepath.Join(from, name), filepath.Join(to, name), true)
	}
	return to
}
