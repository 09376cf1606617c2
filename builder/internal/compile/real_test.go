package compile_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestReal compiles a real driver for a real kernel; it takes minutes. What
// the test should meet is given by the environment:
//
//	PREBAKE_COMPILE_SOURCE, PREBAKE_COMPILE_HEADERS, PREBAKE_COMPILE_TOOLCHAIN
//	                          the three folders
//	PREBAKE_COMPILE_RELEASE   uname -r of the kernel
//	PREBAKE_COMPILE_OUT       where to leave the modules; optional
//	PREBAKE_COMPILE_WORK      work folder; optional
//	PREBAKE_COMPILE_JOBS      make's -j; optional
//	PREBAKE_COMPILE_WANT      fault kind that the build should end with; optional
func TestReal(t *testing.T) {
	source := os.Getenv("PREBAKE_COMPILE_SOURCE")
	if source == "" {
		t.Skip("PREBAKE_COMPILE_SOURCE names no driver source folder")
	}
	work := os.Getenv("PREBAKE_COMPILE_WORK")
	if work == "" {
		work = t.TempDir()
	}
	jobs, _ := strconv.Atoi(os.Getenv("PREBAKE_COMPILE_JOBS"))
	log, err := os.Create(work + ".log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	counts := map[string]string{}
	result, err := compile.Modules(ctx, compile.Request{
		Source: source, Headers: os.Getenv("PREBAKE_COMPILE_HEADERS"), Toolchain: os.Getenv("PREBAKE_COMPILE_TOOLCHAIN"),
		Release: os.Getenv("PREBAKE_COMPILE_RELEASE"), Arch: target.AMD64, Jobs: jobs, WorkDir: work, Log: log,
		Driver:   target.Driver{Version: "0.0", Flavour: target.Flavour(filepath.Base(source))},
		Progress: func(phase string, done, total int) { counts[phase] = fmt.Sprintf("%d/%d", done, total) },
	})
	t.Logf("progress at the end: %v; log: %s", counts, log.Name())
	if perr := timeline.Print(writer{t}, "phases", result.Phases); perr != nil {
		t.Error(perr)
	}
	if want := os.Getenv("PREBAKE_COMPILE_WANT"); want != "" {
		t.Logf("error: %v\nhint: %s", err, fault.Hint(err))
		if err == nil || fault.Of(err).String() != want {
			t.Errorf("Modules = %v (%v); want %s", err, fault.Of(err), want)
		}
		return
	}
	if err != nil {
		t.Fatalf("Modules = %v (%v); want success", err, fault.Of(err))
	}
	for _, name := range slices.Sorted(maps.Keys(result.Modules)) {
		data, err := os.ReadFile(result.Modules[name])
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%-16s %9d bytes sha256 %x", name, len(data), sha256.Sum256(data))
		if out := os.Getenv("PREBAKE_COMPILE_OUT"); out != "" {
			if err := os.WriteFile(filepath.Join(out, name+".ko"), data, 0o644); err != nil {
				t.Error(err)
			}
		}
	}
}

type writer struct{ t *testing.T }

var _ io.Writer = writer{}

func (w writer) Write(p []byte) (int, error) { w.t.Logf("%s", p); return len(p), nil }
