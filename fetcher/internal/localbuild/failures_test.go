package localbuild_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
)

// TestFailuresAreRemembered checks that a failed compile is not repeated for the same driver and builder, unless Retry
// is set.
func TestFailuresAreRemembered(t *testing.T) {
	t.Parallel()
	b := script(t, `echo "error: too few arguments" >&2; echo "hint:  take another" >&2; exit 23`)
	calls := func() int {
		raw, err := os.ReadFile(filepath.Join(filepath.Dir(b.Program), "calls"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(raw), "build --build-id")
	}
	for i, row := range []struct {
		name  string
		retry bool
		wish  string
		calls int
	}{
		{"the first time", false, "R535", 1},
		{"the second time", false, "R535", 1},
		{"once more, by hand", true, "R535", 2},
		{"another driver", false, "R550", 3},
		{"and the first again", false, "R535", 4}, // the node stores only the last failure
	} {
		q := question
		q.Wish = target.Wish(row.wish)
		b.Retry = row.retry
		_, err := build(t.Context(), b, q)
		if !fault.Is(err, fault.APIBreak) || !strings.Contains(err.Error(), "too few arguments") ||
			fault.Hint(err) != "take another" {
			t.Errorf("%s: Build = %v (hint %q)", row.name, err, fault.Hint(err))
		}
		if got := calls(); got != row.calls {
			t.Errorf("%d, %s: compiled %d times; want %d", i, row.name, got, row.calls)
		}
	}
}

// TestWhichFailuresAreRemembered checks by the builder's exit status which failures are remembered. A failure must not
// be remembered if the same compile may succeed later.
func TestWhichFailuresAreRemembered(t *testing.T) {
	t.Parallel()
	for body, remembered := range map[string]bool{
		"exit 20": true, "exit 21": true, "exit 22": true, "exit 23": true, "exit 24": true,
		"exit 27": true, "exit 28": true, // for some time (see TestPauses)
		"exit 1":    false,
		"echo done": false, // an answer without a digest
		"exit 10":   false, "exit 26": false, "exit 30": false,
		"kill -9 $$": false,
	} {
		b := script(t, body)
		for i := range 2 {
			_, err := build(t.Context(), b, question)
			if got := err != nil && strings.Contains(err.Error(), "compiles again after"); err == nil ||
				got != (remembered && i == 1) {
				t.Errorf("%s, compile %d: Build = %v; want it remembered: %t", body, i, err, remembered)
			}
		}
	}
}

// TestPauses checks that a compile that ended with a full disk or at its time limit is not repeated at once, also by
// another process, and that the pause grows. After a full disk it grows to an hour only, because somebody may clean the
// disk.
func TestPauses(t *testing.T) {
	t.Parallel()
	type step struct {
		age   time.Duration // of the last failure
		calls int
	}
	begin := []step{
		{0, 1}, {0, 1}, {9 * time.Minute, 1}, {11 * time.Minute, 2}, {0, 2}, {11 * time.Minute, 2},
		{21 * time.Minute, 3}, {21 * time.Minute, 3}, {41 * time.Minute, 4},
	}
	for name, row := range map[string]struct {
		exit  int
		steps []step
	}{
		"disk full": {27, append(slices.Clone(begin), []step{
			{59 * time.Minute, 4}, {61 * time.Minute, 5}, {59 * time.Minute, 5}, {61 * time.Minute, 6}, {50 * time.Hour, 7},
		}...)},
		"timed out": {28, append(slices.Clone(begin), []step{
			{61 * time.Minute, 4}, {81 * time.Minute, 5}, {161 * time.Minute, 6}, {321 * time.Minute, 7},
			{641 * time.Minute, 8}, {1281 * time.Minute, 9}, {23 * time.Hour, 9}, {25 * time.Hour, 10}, {23 * time.Hour, 10},
		}...)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := script(t, fmt.Sprintf(`echo "error: too little" >&2; exit %d`, row.exit))
			dir := filepath.Dir(b.Program)
			// ago moves the last failure into the past.
			ago := func(age time.Duration) {
				t.Helper()
				file, record := filepath.Join(b.StateDir, "failed.json"), map[string]any{}
				raw, err := os.ReadFile(file)
				if err := errors.Join(err, json.Unmarshal(raw, &record)); err != nil {
					t.Fatal(err)
				}
				record["at"] = time.Now().UTC().Add(-age)
				if raw, err = json.Marshal(record); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, raw, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for i, step := range row.steps {
				if i > 0 {
					ago(step.age)
				}
				_, err := build(t.Context(), builderIn(dir), question)
				if err == nil || fault.Of(err).ExitCode() != row.exit || !strings.Contains(err.Error(), "too little") {
					t.Errorf("%d: Build = %v; want the same error", i, err)
				}
				if got := len(calls(t, dir)); got != step.calls {
					t.Errorf("%d, %v after the last failure: compiled %d times; want %d", i, step.age, got, step.calls)
				}
			}
			b.Retry = true
			want := row.steps[len(row.steps)-1].calls + 1
			if _, err := build(t.Context(), b, question); err == nil || len(calls(t, dir)) != want {
				t.Errorf("with Retry: Build = %v, compiled %d times; want %d", err, len(calls(t, dir)), want)
			}
		})
	}
}

// fullVariable makes the test binary compile twice on a full disk, in the folder that the variable names.
const fullVariable = "PREBAKE_TEST_FULL_DISK"

// TestFullDiskProcess compiles twice. Without the variable it does nothing.
func TestFullDiskProcess(t *testing.T) {
	dir := os.Getenv(fullVariable)
	if dir == "" {
		return
	}
	for i := range 2 {
		_, err := build(t.Context(), builderIn(dir), question)
		if !fault.Is(err, fault.DiskFull) || (strings.Contains(err.Error(), "compiles again after")) != (i == 1) {
			t.Errorf("Build %d = %v; want disk full, remembered: %t", i, err, i == 1)
		}
	}
}

// TestPauseOnFullDisk checks that the pause is kept although the disk of the state folder stays full. In each row, the
// disk gets full at another step of the compile. If it gets full before the compile begins, only a node that has a
// record of an earlier failure can keep the pause: the new record takes the space of that one.
func TestPauseOnFullDisk(t *testing.T) {
	t.Parallel()
	installed.Program(t, "bwrap")
	const fill = `cat /dev/zero >"${0%/*}/state/filler" 2>/dev/null`
	for name, row := range map[string]struct {
		keygen, compile string
		calls           int // of the builder
	}{
		"during the compile": {makesKey, fill + " || exit 27", 2},
		"with the key":       {`cat /dev/zero >"$2" 2>/dev/null || exit 27`, "exit 1", 1},
		"before the compile, after an earlier failure": {
			makesKey + `; echo '{}' >"${0%/*}/state/failed.json"; ` + fill + " || true", "exit 1", 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Dir(scriptWith(t, row.keygen, row.compile).Program)
			disk := filepath.Join(dir, "state")
			if err := os.Mkdir(disk, 0o700); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "bwrap", "--dev-bind", "/", "/", "--size", strconv.Itoa(1<<20), "--tmpfs",
				disk, "--die-with-parent", "--", os.Args[0], "-test.run=^TestFullDiskProcess$", "-test.v")
			cmd.Env = append(os.Environ(), fullVariable+"="+dir)
			if out, err := cmd.CombinedOutput(); err != nil ||
				!strings.Contains(string(out), "--- PASS: TestFullDiskProcess") {
				t.Errorf("%v: %s", err, out)
			}
			if raw, err := os.ReadFile(filepath.Join(dir, "calls")); err != nil ||
				strings.Count(string(raw), "\n") != row.calls {
				t.Errorf("the builder's calls: %q, %v; want %d", raw, err, row.calls)
			}
		})
	}
}

// TestSuccessEndsPauses checks that the pause of the next failure is short again after a success.
func TestSuccessEndsPauses(t *testing.T) {
	t.Parallel()
	b := script(t, `if [ -e "${0%/*}/works" ]; then echo '{"digest":"sha256:ab"}'; exit 0; fi; exit 27`)
	b.Retry = true
	for _, works := range []bool{false, false, true, false} {
		name := filepath.Join(filepath.Dir(b.Program), "works")
		err := os.RemoveAll(name)
		if works {
			err = os.WriteFile(name, nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := build(t.Context(), b, question); (err == nil) != works {
			t.Fatalf("Build = %v; want success %t", err, works)
		}
	}
	raw, err := os.ReadFile(filepath.Join(b.StateDir, "failed.json"))
	if err != nil || !strings.Contains(string(raw), `"tries":1`) {
		t.Errorf("the record is %s, %v; want the first try", raw, err)
	}
}

// TestUnstartedIsNotRemembered checks that nothing is remembered if the builder could not be started.
func TestUnstartedIsNotRemembered(t *testing.T) {
	t.Parallel()
	b := script(t, "exit 22")
	if _, err := build(t.Context(), b, question); !fault.Is(err, fault.Unsupported) { // this also makes the key
		t.Fatal(err)
	}
	b.Retry = true
	if err := os.Chmod(b.Program, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := build(t.Context(), b, question); err == nil || fault.Is(err, fault.Unsupported) {
		t.Fatalf("Build = %v; want the error of the start", err)
	}
	if raw, err := os.ReadFile(filepath.Join(b.StateDir, "failed.json")); err == nil &&
		strings.Contains(string(raw), "run the builder") {
		t.Errorf("remembered: %s", raw)
	}
}
