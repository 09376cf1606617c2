package localbuild_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
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
		"exit 1":    false,
		"echo done": false, // the answer has no digest
		"exit 10":   false, "exit 26": false, "exit 27": false, "exit 28": false, "exit 30": false,
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
