package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/testkit"
)

// soakRounds is the number of rounds of TestSoak. The environment variable PREBAKE_SOAK sets another number.
const soakRounds = 50

// TestSoak kills the real program at random moments of installs, rollbacks and uninstalls. The next run must repair
// what is left. No modules are loaded.
func TestSoak(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("left out with -short; make test runs it")
	}
	rounds := soakRounds
	if text := os.Getenv("PREBAKE_SOAK"); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil {
			t.Fatalf("PREBAKE_SOAK: %v", err)
		}
	}
	dir := t.TempDir()
	program, keys, lay := filepath.Join(dir, "fetcher"), filepath.Join(dir, "keys.pem"), "oci:"+filepath.Join(dir,
		"layout")
	goTool(t, "build", "-trimpath", "-o", program, ".")
	key := testkit.NewKey(t)
	if err := os.WriteFile(keys, key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	versions := []string{"535.100.01", "535.261.03", "550.54.15"}
	var root string
	for i, version := range versions {
		c := sample.NewCell(t, "17800.0.47", version)
		c.Bulk = 512 << 10
		sample.Publish(t, lay, key, c)
		if i == 0 {
			root = sample.Root(t, c, 1)
		}
	}
	where := []string{"--host-root", root}
	install := func(version string) []string {
		return append([]string{"install", "--registry", lay, "--key", keys, "--builder", "never", "--no-load", "--retry",
			"--driver", version}, where...)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	pick := func() []string {
		switch n := rng.IntN(10); {
		case n == 0:
			return append([]string{"uninstall", "--no-load"}, where...)
		case n == 1:
			return append([]string{"rollback", "--no-load", "--key", keys}, where...)
		}
		return install(versions[rng.IntN(len(versions))])
	}
	folder := filepath.Join(root, "home/kubernetes/bin/nvidia")
	usual := 200 * time.Millisecond // how long one run takes; set again by each complete run
	killed := 0
	for round := range rounds {
		// Kill two runs, and let a third one end.
		for range 2 {
			if kill(t, program, pick(), time.Duration(rng.Int64N(int64(usual)))) {
				killed++
			}
			// Whatever happened, a link must have a target or not exist.
			for _, name := range []string{"lib64", "bin", "drivers", "firmware"} {
				if _, err := os.Lstat(filepath.Join(folder, name)); err != nil {
					continue
				}
				if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
					t.Errorf("round %d: link %s has no target: %v", round, name, err)
				}
			}
		}
		version := versions[rng.IntN(len(versions))]
		began := time.Now()
		out, err := exec.CommandContext(t.Context(), program, install(version)...).CombinedOutput()
		usual = time.Since(began)
		if err != nil {
			t.Fatalf("round %d: the run after: %v\n%s", round, err, out)
		}
		if err := checkUp(folder, version); err != nil {
			t.Fatalf("round %d: %v\n%s", round, err, out)
		}
		if out, err := exec.CommandContext(t.Context(), program,
			append([]string{"verify", "--key", keys}, where...)...).CombinedOutput(); err != nil {
			t.Fatalf("round %d: verify: %v\n%s", round, err, out)
		}
	}
	t.Logf("%d rounds, %d runs were killed before they ended", rounds, killed)
	if killed < rounds/4 {
		t.Errorf("%d of %d runs were killed: too few to show anything", killed, 2*rounds)
	}
	// After an uninstall, the install folder must be empty, as before the test.
	if out, err := exec.CommandContext(t.Context(), program,
		append([]string{"uninstall", "--no-load"}, where...)...).CombinedOutput(); err != nil {
		t.Fatalf("uninstall: %v\n%s", err, out)
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("after the uninstall, the install folder has %v, %v", left, err)
	}
}

// kill starts a program and kills it after a while. It returns false if the program had already ended.
func kill(t *testing.T, program string, args []string, after time.Duration) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() }) // fails if the program has ended
	defer timer.Stop()
	var exit *exec.ExitError
	return errors.As(cmd.Wait(), &exit) && exit.Sys().(syscall.WaitStatus).Signaled()
}

// checkUp checks that all files of an installed driver are there, and have the given version.
func checkUp(folder, version string) error {
	lib, err := os.ReadFile(filepath.Join(folder, "lib64/libnvidia-ml.so.1"))
	if err != nil {
		return err
	}
	if string(lib) != "library "+version {
		return fmt.Errorf("libnvidia-ml.so.1 is %.40q; want that of %s", lib, version)
	}
	for _, name := range []string{"drivers/nvidia.ko", "firmware/nvidia/" + version + "/gsp_tu10x.bin", "bin/nvidia-smi"} {
		if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
			return err
		}
	}
	note, err := os.ReadFile(filepath.Join(folder, ".cache"))
	if err == nil && !strings.Contains(string(note), version) {
		err = fmt.Errorf(".cache is %q; want %s in it", note, version)
	}
	return err
}
