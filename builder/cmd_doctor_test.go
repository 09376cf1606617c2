package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/pkg/fault"
)

// TestDoctor checks that doctor fails for destinations to which it cannot write. Its other findings depend on the
// machine.
func TestDoctor(t *testing.T) {
	t.Parallel()
	args := []string{"doctor", "--cache", filepath.Join(t.TempDir(), "cache"), "--to", "oci:/proc/self/x", "--to",
		"oci:" + t.TempDir(), "--to", "file://" + t.TempDir(), "--key", filepath.Join(t.TempDir(), "none")}
	code, out, errs := runOne(t, doctorCommand(), args...)
	if code == 0 || !strings.Contains(errs, "this machine cannot build") || !strings.Contains(errs, "hint:") {
		t.Errorf("doctor = %d\n%s; want a failure and what to do", code, errs)
	}
	for line := range strings.Lines(out) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 && strings.Count(strings.TrimSpace(line), " ") > 0 {
			t.Errorf("a line of %d columns: %s", n, line)
		}
	}
	for _, want := range []string{"fail  destination", "ok    destination", "fail  key", "next: "} {
		if !strings.Contains(out, want) {
			t.Errorf("the table lacks %q:\n%s", want, out)
		}
	}
	_, out, _ = runOne(t, doctorCommand(), append(args, "--output", "json")...)
	var r doctor.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// The exit code must be the code of the first failed finding's fault class.
	kind, err := fault.Parse(firstClass(r))
	if err != nil || kind.ExitCode() != code {
		t.Errorf("exit code %d, first failure of class %q (%v)", code, firstClass(r), err)
	}
}

func firstClass(r doctor.Report) string {
	for _, f := range r.Findings {
		if f.Level == doctor.Fail {
			return f.Class
		}
	}
	return ""
}
