package e2e

import (
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

// compiledFiles matches the end of the phase compile in the builder's log. The second number is missing if no object
// came from the cache.
var compiledFiles = regexp.MustCompile(`- compile +[0-9.]+ s +([0-9]+) files(?:, ([0-9]+) reused)?`)

// TestNeighbour builds a driver after its neighbour in the same branch, for the same kernel: 535.274.02 after
// 535.261.03. NVIDIA changed 7 of some 190 sources and added one conftest question. So the builder must take nearly all
// objects from its cache. The cache has no modules, because these would answer before any object does.
func TestNeighbour(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder") {
		return
	}
	defer shared.turns.take(40)()
	const neighbour, atLeast = "535.274.02", 150
	k := shared.kernel(1)
	mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	dir := t.TempDir()
	if _, err := shared.Must(t.Context(), "mirror", "--out", dir, "--cache", filepath.Join(shared.State, "packages"),
		"--neighbour", "--kernels", "2"); err != nil {
		t.Fatal(err)
	}
	cache := linkCache(t, "driver-", "headers-", "toolchain-", "fetched-", "tree-digest-", "header-view-", "conftest-",
		"flag-tests-", "object-", "userspace", "firmware", "layer-")
	build := func(driver string) (files, reused int) {
		res, err := shared.Run(t.Context(), "builder", "build", "--build-id", k.BuildID, "--board", k.Board, "--driver",
			driver, "--flavour", "proprietary", "--kernel-mirror", shared.mirror.KernelURL(), "--driver-mirror",
			"file://"+filepath.Join(dir, "drivers"), "--cache", cache, "--key", shared.key, "--to",
			"oci:"+filepath.Join(t.TempDir(), "layout"), "--load-test", "off")
		if err != nil || res.Code != 0 {
			t.Fatalf("build of %s = %d, %v\n%s", driver, res.Code, err, res.Stderr)
		}
		m := compiledFiles.FindSubmatch(res.Stderr)
		if m == nil {
			t.Fatalf("build of %s says nothing about the objects:\n%s", driver, res.Stderr)
		}
		files, _ = strconv.Atoi(string(m[1]))
		reused, _ = strconv.Atoi(string(m[2]))
		return files, reused
	}
	build(shared.driver()) // if the shared cache has lost the objects, this build compiles them again
	files, reused := build(neighbour)
	if reused < atLeast || reused >= files {
		t.Errorf("of %d objects %d come from the cache; want at least %d, but not all", files, reused, atLeast)
	}
	t.Logf("of %d objects %d come from the cache", files, reused)
}
