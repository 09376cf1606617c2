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

// Most of what the compiler does for a question is to read the kernel's headers.
// Questions whose programs begin with the same ones share a precompiled header.
// It is made in a sandbox of its own by the driver's script, with none of its
// tests: what shows there is covered by the key of every answer. The tests see it
// read-only. Tokens, macros and flags are those of the plain compilation, so the
// answers are, too; TestRealSameBytes compares them.
const (
	insideHeader  = "/prebake/begin"
	insideWrapper = "/prebake/front"

	// How many programs have to begin alike. Making a precompiled header costs gcc
	// about as much as three of them, and clang as much as one and a half.
	minForHeader      = 4
	minForHeaderClang = 3

	maxHeaderText = 64 << 10
)

//go:embed begin.sh
var headerScript string

//go:embed beginmake.sh
var headerMakeScript string

// sharedHeader is a precompiled header for some questions.
type sharedHeader struct {
	headers []string
	at      string // its folder, and begin/ in it as the sandbox left it, shown read-only
	dir     string

	made sync.Once
	err  error
	// prefix are the lines that the script puts before every program; none where
	// there is no precompiled header.
	prefix []string
	left   int // questions that are still to be asked
}

// assignHeaders finds the questions that share a beginning.
func (a *answers) assignHeaders(open []question, dir string) {
	if a.view.Macros {
		return // headers may ask what the answers are
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
				at: filepath.Join(dir, "begin-"+strconv.Itoa(made))}
			made++
			for _, i := range same[name] {
				open[i].header, open[i].lines = b, candidates[i][n-1].Lines
			}
		}
	}
}

// task is a precompiled header to make, or else a question to ask.
type task struct {
	header   *sharedHeader
	question question
}

// schedule orders the work so that a precompiled header is made while the
// questions of the one before are asked, and few are on the disk at a time.
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

// asked counts a question, and removes the precompiled header after the last one.
func (b *sharedHeader) asked() error {
	if b == nil {
		return nil
	}
	if b.left--; b.left > 0 {
		return nil
	}
	return os.RemoveAll(b.at)
}

// writeWrapper writes a wrapper script for the compiler.
func (a *answers) writeWrapper(dir, script string) error {
	use, strict := "-include "+insideHeader+"/text.h", "-Winvalid-pch -Werror=invalid-pch"
	if a.t.clang {
		use, strict = "-include-pch "+insideHeader+"/text.h.gch", ""
	}
	name := filepath.Base(a.t.compiler)
	text := strings.NewReplacer("@COMPILER@", insideGuard+"/"+name, "@BEGIN@", insideHeader, "@USE@", use, "@STRICT@",
		strict).Replace(script)
	return write(filepath.Join(dir, name), text, 0o755)
}

// withWrapper installs the wrapper script of a folder.
func withWrapper(box sandbox.Config, dir string) sandbox.Config {
	box.Binds = append(slices.Clone(box.Binds), sandbox.Bind{Host: dir, Inside: insideWrapper})
	box.Env = maps.Clone(box.Env)
	box.Env["PATH"] = insideWrapper + ":" + box.Env["PATH"]
	return box
}

// make makes the precompiled header, once. An error is one of the machine's; a
// compiler that cannot make one, or not use it, is none.
func (b *sharedHeader) make(ctx context.Context, a *answers) error {
	b.made.Do(func() { b.err = b.makeOnce(ctx, a, b.at) })
	return b.err
}

func (b *sharedHeader) makeOnce(ctx context.Context, a *answers, dir string) error {
	script, test, err := a.script.OnlyHeaders(b.headers)
	if err != nil {
		return nil //nolint:nilerr // a script of another shape goes without
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
		sandbox.Bind{Host: work, Inside: insideAsk, Writable: true},
		sandbox.Bind{Host: begin, Inside: insideHeader, Writable: true})
	box.Dir, box.MaxOutput = insideAsk, 1<<20
	box.Limits.Time, box.Limits.Disk = 10*time.Minute, 1<<30
	box.Argv = a.askArguments(question{argv: []string{conftest.ModeTest, a.keyer.Flags(), test}})
	err = sandbox.Run(ctx, box)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err := compilerFault(told); fault.Is(err, fault.Internal) {
		return os.RemoveAll(dir) // the compiler crashes over them, which is not to say over a program
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

// withHeader lets a question's programs begin with what is compiled.
func (a *answers) withHeader(box sandbox.Config, q question) sandbox.Config {
	if q.header == nil || q.header.prefix == nil {
		return box
	}
	box = withWrapper(box, a.wrapperDir)
	box.Binds = append(box.Binds, sandbox.Bind{Host: q.header.dir, Inside: insideHeader})
	lines := slices.Concat(q.header.prefix, q.lines)
	box.Env["PREBAKE_LINES"], box.Env["PREBAKE_BEGIN"] = strconv.Itoa(len(lines)), strings.Join(lines, "\n")
	return box
}

// askArguments run the script for a question.
func (a *answers) askArguments(q question) []string {
	return append([]string{"sh", "-c", `exec /bin/sh ./conftest.sh "$@" > answer`, "sh", a.plan.CC, a.plan.Arch,
		a.plan.Sources, a.plan.Output}, q.argv...)
}
