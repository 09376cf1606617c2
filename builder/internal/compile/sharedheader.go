package compile

import (
	"context"
	_ "embed"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prebake/prebake/builder/internal/conftest"
	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// For a conftest test, the compiler spends most of its time on reading the kernel's headers. Tests whose programs begin
// with the same headers share one precompiled header.
//
// The driver's conftest.sh makes the precompiled header in a sandbox of its own, without the driver's tests. The key of
// every stored result covers all files in that sandbox. The results are the same as without a precompiled header;
// TestRealSameBytes checks this.
const (
	insideHeader  = "/prebake/begin"
	insideWrapper = "/prebake/front"

	// The minimum number of programs for which a shared precompiled header is made. Making it takes as long as compiling
	// three programs with gcc, or one and a half with clang.
	minForHeader      = 4
	minForHeaderClang = 3

	maxHeaderText = 64 << 10 // bytes
)

//go:embed begin.sh
var headerScript string

//go:embed beginmake.sh
var headerMakeScript string

// sharedHeader is one precompiled header that several tests share.
type sharedHeader struct {
	headers []string // the kernel's headers in it, in the order of their includes
	// workDir is the work folder of this precompiled header. dir is the folder in it with the header itself; later
	// sandboxes show dir read-only.
	workDir string
	dir     string

	once sync.Once
	err  error // the result of makeOnce
	// prefix has the lines that the script puts before every program. It is nil if the compiler could not make or use the
	// precompiled header.
	prefix []string
	left   int // number of tests that have no result yet
}

// assignHeaders assigns one shared header to each group of tests whose programs begin with the same headers, if the
// group is large enough. If several shared headers are possible, it chooses the longest common beginning.
func (a *answerer) assignHeaders(open []question, dir string) {
	if a.view.Macros {
		return // the kernel's headers depend on results of tests, so they may differ between tests
	}
	candidates := make([][]conftest.Prefix, len(open))
	longest, made, least := 0, 0, minForHeader
	if a.t.clang {
		least = minForHeaderClang
	}
	for i, q := range open {
		if q.test != "" {
			candidates[i] = a.script.Prefixes(q.test, q.headers)
			longest = max(longest, len(candidates[i]))
		}
	}
	key := func(b conftest.Prefix) string { return strings.Join(b.Headers, " ") }
	for n := longest; n > 0; n-- {
		same := map[string][]int{}
		for i, some := range candidates {
			if len(some) >= n && open[i].header == nil {
				same[key(some[n-1])] = append(same[key(some[n-1])], i)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(same)) {
			if len(same[name]) < least {
				continue
			}
			b := &sharedHeader{headers: candidates[same[name][0]][n-1].Headers, left: len(same[name]),
				workDir: filepath.Join(dir, "begin-"+strconv.Itoa(made))}
			made++
			for _, i := range same[name] {
				open[i].header, open[i].lines = b, candidates[i][n-1].Lines
			}
		}
	}
}

// task is either a precompiled header to make or, if header is nil, a test to run.
type task struct {
	header   *sharedHeader
	question question
}

// schedule orders the tasks so that only few precompiled headers are on the disk at a time.
func schedule(open []question) []task {
	var plain, all []task
	of := map[*sharedHeader][]task{}
	var order []*sharedHeader
	for _, q := range open {
		if q.header == nil {
			plain = append(plain, task{question: q})
			continue
		}
		if of[q.header] == nil {
			order = append(order, q.header)
		}
		of[q.header] = append(of[q.header], task{question: q})
	}
	for i, b := range order {
		if i == 0 {
			all = append(all, task{header: b})
		}
		if i+1 < len(order) {
			all = append(all, task{header: order[i+1]})
		}
		all = append(all, of[b]...)
	}
	return append(all, plain...)
}

// countAnswer counts one finished test. After the last test that shares the precompiled header, it removes the header.
func (b *sharedHeader) countAnswer() error {
	if b == nil {
		return nil
	}
	if b.left--; b.left > 0 {
		return nil
	}
	return os.RemoveAll(b.workDir)
}

// writeWrapper fills in the template of a compiler wrapper and writes it to dir.
func (a *answerer) writeWrapper(dir, script string) error {
	use, strict := "-include "+insideHeader+"/text.h", "-Winvalid-pch -Werror=invalid-pch"
	if a.t.clang {
		use, strict = "-include-pch "+insideHeader+"/text.h.gch", ""
	}
	name := filepath.Base(a.t.compiler)
	text := strings.NewReplacer("@COMPILER@", insideGuard+"/"+name, "@BEGIN@", insideHeader, "@USE@", use, "@STRICT@",
		strict).Replace(script)
	return write(filepath.Join(dir, name), text, 0o755)
}

// withWrapper returns a copy of the sandbox in which a wrapper script runs in place of the compiler.
func withWrapper(box sandbox.Config, dir string) sandbox.Config {
	box.Binds = append(slices.Clone(box.Binds), sandbox.Bind{Host: dir, Inside: insideWrapper})
	box.Env = maps.Clone(box.Env)
	box.Env["PATH"] = insideWrapper + ":" + box.Env["PATH"]
	return box
}

// ensure makes the precompiled header, once. It returns an error only for a fault of the machine. If the compiler
// cannot make or use the header, b.prefix stays nil.
func (b *sharedHeader) ensure(ctx context.Context, a *answerer) error {
	b.once.Do(func() { b.err = b.makeOnce(ctx, a, b.workDir) })
	return b.err
}

func (b *sharedHeader) makeOnce(ctx context.Context, a *answerer, dir string) error {
	script, test, err := a.script.OnlyHeaders(b.headers)
	if err != nil {
		return nil //nolint:nilerr // this script has another form: its tests get no precompiled header
	}
	work, told := filepath.Join(dir, "work"), filepath.Join(dir, "trouble")
	front, begin := filepath.Join(dir, "front"), filepath.Join(dir, "begin")
	err = errors.Join(os.MkdirAll(begin, 0o755), a.writeWrapper(front, headerMakeScript),
		write(filepath.Join(work, "conftest.sh"), string(script), 0o644),
		write(filepath.Join(work, "conftest/headers.h"), a.keyer.VisibleToAll(a.present), 0o644))
	if err != nil {
		return err
	}
	box, err := withFaultFile(a.box, told)
	if err != nil {
		return err
	}
	box = withWrapper(box, front)
	box.Binds = append(box.Binds,
		sandbox.Bind{Host: work, Inside: insideSource, Writable: true},
		sandbox.Bind{Host: begin, Inside: insideHeader, Writable: true})
	box.Dir, box.MaxOutput = insideSource, 1<<20
	box.Limits.Time, box.Limits.Disk = 10*time.Minute, 1<<30
	box.Argv = a.askArguments(question{argv: []string{conftest.ModeTest, a.keyer.Flags(), test}})
	err = sandbox.Run(ctx, box)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err := compilerFault(told); fault.Is(err, fault.Internal) {
		return os.RemoveAll(dir) // the compiler crashed on the precompiled header; it may still compile the programs
	} else if err != nil {
		return err
	}
	var exit *sandbox.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	if _, err := untrusted.ReadFile(begin, "works", 0); errors.Is(err, fs.ErrNotExist) {
		return os.RemoveAll(dir)
	} else if err != nil {
		return fault.Wrap(fault.Internal, err, hintLog)
	}
	program, err := untrusted.ReadFile(begin, "program", maxHeaderText)
	if err != nil {
		return fault.Wrap(fault.Internal, err, hintLog)
	}
	lines := strings.Split(strings.TrimSpace(string(program)), "\n")
	var end []string
	for _, h := range b.headers {
		end = append(end, "#include "+h)
	}
	if n := len(lines) - len(end); n > 0 && slices.Equal(lines[n:], end) {
		b.prefix, b.dir = lines[:n], begin
	}
	return nil
}

// withHeader adds the test's precompiled header to the test's sandbox. A test without such a header keeps its sandbox.
func (a *answerer) withHeader(box sandbox.Config, q question) sandbox.Config {
	if q.header == nil || q.header.prefix == nil {
		return box
	}
	box = withWrapper(box, a.wrapperDir)
	box.Binds = append(box.Binds, sandbox.Bind{Host: q.header.dir, Inside: insideHeader})
	lines := slices.Concat(q.header.prefix, q.lines)
	box.Env["PREBAKE_LINES"], box.Env["PREBAKE_BEGIN"] = strconv.Itoa(len(lines)), strings.Join(lines, "\n")
	return box
}

// askArguments returns the command that runs the driver's script for one test.
func (a *answerer) askArguments(q question) []string {
	return append([]string{"sh", "-c", `exec /bin/sh ./conftest.sh "$@" > answer`, "sh", a.plan.CC, a.plan.Arch,
		a.plan.Sources, a.plan.Output}, q.argv...)
}
