package compile

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/builder/internal/conftest"
	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/sandbox"
)

// insidePlan is the folder inside the sandbox to which `make` writes the plan.
//
// A test is one call of the driver's conftest.sh. Each test has its own work folder, /tmp and fault file (guard.go),
// and can write to nothing else. The work folder is at insideSource, in place of the driver's sources: there `make`
// runs the script, and the compiler's flags name this folder. A test may write a header there that only these flags
// find.
const insidePlan = "/prebake/plan"

// Limits in bytes for the result of a test, for the plan and for one file of the folder conftest/.
const (
	maxAnswer = 64 << 10
	maxPlan   = 1 << 20
	maxHeader = 4 << 20
)

// errUseMake means that this package cannot provide the results of conftest.sh's tests. The build continues: `make`
// runs the tests itself, which takes longer.
var errUseMake = errors.New("the command make has to run conftest.sh itself")

// answerer provides the results of conftest.sh's tests before `make` runs. It uses a stored result if the test and the
// view (see view.go) are the same. Otherwise it runs the test in a sandbox that shows only files that the result's key
// covers.
type answerer struct {
	*build
	view   *view
	box    sandbox.Config    // `make`'s sandbox without the sources; the view's replacements cover the masked files
	files  map[string]string // files of the folder conftest/, by name
	script *conftest.Script
	plan   *conftest.Plan
	keyer  *conftest.Keyer
	stored conftest.Answers
	// present is the text of conftest/headers.h. wrapperDir is the folder of the compiler wrapper that uses precompiled
	// headers.
	present, wrapperDir string
}

// answerQuestions writes the results of conftest.sh's tests into the staged sources. If the error wraps errUseMake, the
// staged sources are unchanged.
func (b *build) answerQuestions(ctx context.Context, v *view) (*answerer, error) {
	text, err := readHost(filepath.Join(b.src, "conftest.sh"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the driver has no conftest.sh", errUseMake)
	} else if err != nil {
		return nil, err
	}
	script, err := conftest.ParseScript(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUseMake, err)
	}
	// The mode patch_check of conftest.sh prints macros from patch files, which no cache key covers.
	if found, err := fs.Glob(hostFS(b.src), "patch-*.h"); err != nil || len(found) > 0 {
		return nil, fmt.Errorf("%w: the sources contain patch files (patch-*.h)", errUseMake)
	}
	a := &answerer{build: b, view: v, script: script, files: map[string]string{}}
	a.box = b.box
	a.box.Binds = slices.DeleteFunc(slices.Clone(b.box.Binds), func(bind sandbox.Bind) bool { return bind.Writable })
	masks, err := v.binds(filepath.Join(b.r.WorkDir, "masks"))
	if err != nil {
		return nil, err
	}
	a.box.Binds = append(a.box.Binds, masks...)
	if a.plan, err = a.findPlan(ctx); err != nil {
		return nil, err
	}
	a.keyer = conftest.NewKeyer(script, a.plan,
		conftest.Basis{View: v.Digest, Toolchain: b.r.ToolchainDigest, Host: b.r.HostDigest, Recipe: Recipe,
			Macros: v.Macros})
	if a.stored, err = readStored(b.r.Cache, a.keyer.CacheKey()); err != nil {
		return nil, err
	}
	files, err := a.find(ctx)
	if err != nil {
		return nil, err
	}
	return a, a.write(files)
}

func readStored(cache *cas.Cache, key string) (conftest.Answers, error) {
	if raw, ok := cache.Fact("conftest-2", key); ok {
		return conftest.ReadAnswers(raw), nil
	}
	return conftest.Answers{}, nil
}

// findPlan returns the plan: the list of the conftest.sh tests that the driver's makefiles run. If the plan is not in
// the cache, `make` runs the driver's sanity checks and writes the plan.
func (a *answerer) findPlan(ctx context.Context) (*conftest.Plan, error) {
	args := slices.Clone(a.args)
	for i, arg := range args {
		if strings.HasPrefix(arg, "KERNEL_UNAME=") {
			args[i] = "KERNEL_UNAME=masked"
		}
	}
	key := strings.Join(append([]string{Recipe, a.view.Digest, a.r.ToolchainDigest, a.r.HostDigest, a.r.SourceDigest,
		string(a.r.Driver.Flavour)}, args...), "\n")
	if raw, ok := a.r.Cache.Fact("conftest-plan-2", key); ok {
		if plan, err := conftest.ParsePlan(string(raw)); err == nil {
			return plan, nil
		}
	}
	// Here `make` sees masked headers, so the files that it changes must not get into the build. It gets its own copy
	// of the sources.
	dir := filepath.Join(a.r.WorkDir, "plan")
	src, told := filepath.Join(dir, "src"), filepath.Join(dir, "told")
	if err := os.MkdirAll(told, 0o755); err != nil {
		return nil, err
	}
	if err := stage(ctx, a.r.Source, src); err != nil {
		return nil, err
	}
	if err := appendTo(filepath.Join(src, "Kbuild"), conftest.PlanRules(insidePlan+"/plan")); errors.Is(err,
		fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the driver has no Kbuild file", errUseMake)
	} else if err != nil {
		return nil, err
	}
	var said bytes.Buffer
	box, err := withFaultFile(a.box, filepath.Join(dir, "trouble"))
	if err != nil {
		return nil, err
	}
	box.Argv, box.Output, box.MaxOutput = slices.Concat(args, []string{"-j1"}), &said, 16<<20
	box.Limits.Time = 10 * time.Minute
	box.Binds = append(box.Binds,
		sandbox.Bind{Host: src, Inside: insideSource, Writable: true},
		sandbox.Bind{Host: told, Inside: insidePlan, Writable: true})
	err = sandbox.Run(ctx, box) // an exit error is normal: `make` fails after it has written the plan
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	if err := compilerFault(filepath.Join(dir, "trouble")); err != nil {
		return nil, err
	}
	var exit *sandbox.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	text, rerr := untrusted.ReadFile(told, "plan", maxPlan)
	if rerr != nil {
		return nil, a.noPlan(err, said.String())
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	plan, err := conftest.ParsePlan(string(text))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUseMake, err)
	}
	if plan.Sources != insideKernel || plan.Output != insideKernel {
		return nil, fmt.Errorf("%w: make reports the kernel's source folder %s and output folder %s; want %s for both",
			errUseMake, plan.Sources, plan.Output, insideKernel)
	}
	return plan, a.r.Cache.PutFact("conftest-plan-2", key, text)
}

// noPlan returns the error for a missing plan. If a sanity check of the driver failed, noPlan returns the given error
// of `make` unchanged. Otherwise the error wraps errUseMake.
func (a *answerer) noPlan(err error, said string) error {
	var f findings
	for line := range strings.Lines(said) {
		f.read(strings.TrimRight(line, "\r\n"))
	}
	if _, known := checks[f.check]; known && err != nil {
		fmt.Fprint(a.watch, said)
		return err // [diagnose] reads this error together with the findings of the watch
	}
	return fmt.Errorf("%w: make wrote no usable list of conftest.sh's tests; the last line of make's output was: %s",
		errUseMake, f.lastLine)
}

func appendTo(file, text string) error {
	return updateHost(file, os.O_WRONLY|os.O_APPEND, func(f *os.File) error {
		_, err := f.WriteString(text)
		return err
	})
}

// question is one call of conftest.sh. The call runs one test, or lists the driver's patches.
type question struct {
	name, key string
	test      string   // the only compile test in this call's copy of conftest.sh; "" means none
	argv      []string // the script's arguments from the fifth on
	headers   string   // the part of conftest/headers.h that the test may see
	// header is the precompiled header with which the test's program begins; nil means none. lines are the program's
	// first lines after the script's own lines, up to the include of the precompiled header's last file.
	header *sharedHeader
	lines  []string
}

// find returns the files of the folder conftest/. It runs the tests that have no stored result, and stores the new
// results.
func (a *answerer) find(ctx context.Context) ([]conftest.File, error) {
	known, flags := len(a.stored), a.keyer.Flags()
	a.watch.expect.conftest = max(1, len(a.plan.Headers)) + len(a.plan.All())
	var about []question
	for _, name := range a.plan.Headers {
		if !a.script.OneHeader() {
			return nil, fmt.Errorf("%w: conftest.sh has no mode that tests a single header", errUseMake)
		}
		about = append(about, question{name: name, key: a.keyer.HeaderKey(name),
			argv: []string{conftest.ModeHeader, flags, name}})
	}
	if len(a.plan.Headers) == 0 {
		if a.script.OneHeader() {
			return nil, fmt.Errorf("%w: make's list of conftest.sh's tests names no header", errUseMake)
		}
		about = []question{{key: a.keyer.HeaderKey(""), argv: []string{conftest.ModeHeaders, flags}}}
	}
	headers, err := a.ask(ctx, about)
	if err != nil {
		return nil, err
	}
	// The kernel's release may be empty here, because headers.h contains it only in a comment.
	for _, f := range a.plan.Files(headers, nil, "", "") {
		if f.Name == "headers.h" {
			a.present = f.Text
		}
	}
	about = []question{{name: conftest.ModePatches, key: a.keyer.PatchesKey(), argv: []string{conftest.ModePatches}}}
	for _, name := range append(a.plan.All(), "uts_release") {
		key, ok := a.keyer.TestKey(name, a.present)
		if !ok {
			return nil, fmt.Errorf("%w: conftest.sh has no test %s", errUseMake, name)
		}
		about = append(about, question{name: name, key: key, test: name, argv: []string{conftest.ModeTest, flags, name},
			headers: a.keyer.Visible(name, a.present)})
	}
	tests, err := a.ask(ctx, about)
	if err != nil {
		return nil, err
	}
	if len(a.stored) > known {
		if raw := a.stored.Bytes(); raw != nil {
			if err := a.r.Cache.PutFact("conftest-2", a.keyer.CacheKey(), raw); err != nil {
				return nil, err
			}
		}
	}
	release, err := a.release(tests["uts_release"])
	if err != nil {
		return nil, err
	}
	return a.plan.Files(headers, tests, tests[conftest.ModePatches], release), nil
}

// ask returns the output of conftest.sh for each call, by the name of the test. It runs the tests that have no stored
// result, and adds the new results to a.stored.
func (a *answerer) ask(ctx context.Context, about []question) (map[string]string, error) {
	found, asked := map[string]string{}, map[string]bool{}
	var open []question
	for _, q := range about {
		if text, ok := a.stored[q.key]; ok {
			found[q.name] = text
		} else if !asked[q.name] {
			asked[q.name], open = true, append(open, q)
		}
	}
	remembered := len(found)
	if _, ok := found[conftest.ModePatches]; ok {
		remembered-- // the list of patches is not a test
	}
	a.watch.reuse(phaseConftest, remembered)
	dir := filepath.Join(a.r.WorkDir, "ask")
	a.assignHeaders(open, dir)
	a.wrapperDir = filepath.Join(dir, "front")
	if err := a.writeWrapper(a.wrapperDir, headerScript); err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards the watch, the maps found and a.stored, and sharedHeader.left
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(a.r.Jobs)
	answer := func(q question, dir string) error {
		if q.header != nil {
			if err := q.header.ensure(gctx, a); err != nil {
				return err
			}
		}
		text, err := a.askOne(gctx, q, dir)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if q.name != conftest.ModePatches {
			fmt.Fprintf(a.watch, " CONFTEST: %s\n", q.name)
		}
		found[q.name], a.stored[q.key] = text, text
		return q.header.countAnswer()
	}
	for i, next := range schedule(open) {
		g.Go(func() error {
			if next.header != nil {
				return next.header.ensure(gctx, a)
			}
			return answer(next.question, filepath.Join(dir, strconv.Itoa(i)))
		})
	}
	return found, errors.Join(g.Wait(), context.Cause(ctx))
}

// askOne runs the driver's conftest.sh for one test in its own sandbox and returns the script's output.
func (a *answerer) askOne(ctx context.Context, q question, dir string) (text string, err error) {
	script, err := a.script.Question(q.test)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errUseMake, err)
	}
	work, told := filepath.Join(dir, "work"), filepath.Join(dir, "trouble")
	for name, text := range map[string]string{"conftest.sh": string(script), "conftest/headers.h": q.headers} {
		if err := write(filepath.Join(work, name), text, 0o644); err != nil {
			return "", err
		}
	}
	box, err := withFaultFile(a.box, told)
	if err != nil {
		return "", err
	}
	var said bytes.Buffer
	box = a.withHeader(box, q)
	box.Binds = append(box.Binds, sandbox.Bind{Host: work, Inside: insideSource, Writable: true})
	box.Dir, box.Output, box.MaxOutput = insideSource, &said, 1<<20
	box.Limits.Time, box.Limits.Disk = 10*time.Minute, 512<<20
	box.Argv = a.askArguments(q)
	err = sandbox.Run(ctx, box)
	if cause := context.Cause(ctx); cause != nil {
		return "", cause
	}
	if err := compilerFault(told); err != nil {
		return "", err
	}
	var exit *sandbox.ExitError
	if errors.As(err, &exit) && !exit.Killed() {
		return "", fmt.Errorf("%w: run conftest.sh for %s: %w; the script printed %.200q", errUseMake, q.name, err,
			said.String())
	} else if err != nil {
		return "", diagnose(err, findings{})
	}
	raw, err := untrusted.ReadFile(work, "answer", maxAnswer)
	if err != nil {
		return "", fmt.Errorf("%w: read the result of conftest.sh for %s: %w", errUseMake, q.name, err)
	}
	return string(raw), os.RemoveAll(dir)
}

// release replaces the masked string in the result of the test uts_release by the kernel's release.
func (a *answerer) release(answer string) (string, error) {
	text, err := readHost(filepath.Join(a.r.Headers, "include/generated/utsrelease.h"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", errUseMake, err)
	}
	strs := quoted.FindAll(text, -1)
	if len(strs) != 1 || strings.Count(answer, maskedString) != 1 {
		return "", fmt.Errorf(
			"%w: want exactly one string in utsrelease.h, and one in the result of conftest.sh's test uts_release", errUseMake)
	}
	return strings.Replace(answer, maskedString, string(strs[0]), 1), nil
}

//go:embed conftest.sh
var answeredScript string

// write writes the files of the folder conftest/. A file comes after the files that it depends on, because `make`
// compares their times. write also replaces the driver's conftest.sh by a script that only prints these results. So no
// conftest code of the driver runs in the sandbox of `make`.
func (a *answerer) write(files []conftest.File) error {
	script := strings.NewReplacer("@CFLAGS@", a.plan.CFlags, "@RELEASE@",
		insideSource+"/conftest/uts_release").Replace(answeredScript)
	if err := os.WriteFile(filepath.Join(a.src, "conftest.sh"), []byte(script), 0o644); err != nil {
		return err
	}
	for _, f := range files {
		if err := write(filepath.Join(a.src, "conftest", f.Name), f.Text, 0o644); err != nil {
			return err
		}
		a.files[f.Name] = f.Text
	}
	return nil
}

// unchanged reports whether the files of the folder conftest/ still have the content that the method write gave them.
func (a *answerer) unchanged(left *untrusted.Dir) bool {
	for name, text := range a.files {
		if now, err := left.Read("conftest/"+name, maxHeader); err != nil || string(now) != text {
			return false
		}
	}
	return true
}
