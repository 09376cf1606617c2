package compile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/prebake/prebake/builder/internal/conftest"
	"github.com/prebake/prebake/builder/internal/sandbox"
)

// insideAid is where the build's own helper files are in the sandbox.
const insideAid = "/prebake/aid"

// batchScript lies beside conftest.sh, which looks around in its own folder.
const batchScript = "prebake-conftest.sh"

// questionsAtOnce is how many questions one shell answers: enough that parsing
// the script is a small part, few enough that all processors end together.
const questionsAtOnce = 6

// errNoAid says that conftest is left to make, and why; make then does the
// same work at its own pace.
var errNoAid = errors.New("conftest is left to make")

// aid answers conftest's questions before make asks them: from memory where
// the same question was asked of an equal view, and many to a shell otherwise.
type aid struct {
	*build
	view *view
	dir  string // in WorkDir
	box  sandbox.Config
	// laid is what lay gave to make, by path below src/conftest.
	laid map[string]string
}

// prepare lays conftest's answers into the staged sources. An error that wraps
// errNoAid leaves the sources as they were.
func (b *build) prepare(ctx context.Context) (*aid, error) {
	text, err := os.ReadFile(filepath.Join(b.src, "conftest.sh"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the driver has no conftest.sh", errNoAid)
	} else if err != nil {
		return nil, err
	}
	script, err := conftest.ParseScript(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAid, err)
	}
	// patch_check prints what such files define.
	if found, err := filepath.Glob(filepath.Join(b.src, "patch-*.h")); err != nil || len(found) > 0 {
		return nil, fmt.Errorf("%w: the sources are patched", errNoAid)
	}
	a := &aid{build: b, dir: filepath.Join(b.r.WorkDir, "aid"), box: b.box, laid: map[string]string{}}
	for _, dir := range []string{"", "tests", "headers"} {
		if err := os.Mkdir(filepath.Join(a.dir, dir), 0o755); err != nil {
			return nil, err
		}
	}
	if a.view, err = newView(ctx, b.r.Cache, b.r.Headers, b.r.HeaderDigest); err != nil {
		return nil, fmt.Errorf("read header tree: %w", err)
	}
	masks, err := a.view.binds(filepath.Join(a.dir, "masks"))
	if err != nil {
		return nil, err
	}
	a.box.Binds = append(slices.Clone(b.box.Binds), masks...)
	a.box.Binds = append(a.box.Binds, sandbox.Bind{Host: a.dir, Inside: insideAid, Writable: true})

	plan, err := a.plan(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.answer(ctx, script, plan); err != nil {
		return nil, errors.Join(err, os.RemoveAll(filepath.Join(b.src, "conftest")), os.RemoveAll(filepath.Join(b.src, batchScript)))
	}
	return a, nil
}

// plan asks make for its questions. It is remembered: the makefiles of driver
// and kernel decide it.
func (a *aid) plan(ctx context.Context) (*conftest.Plan, error) {
	args := slices.Clone(a.args)
	for i, arg := range args {
		if strings.HasPrefix(arg, "KERNEL_UNAME=") {
			args[i] = "KERNEL_UNAME=masked"
		}
	}
	key := strings.Join(append([]string{Recipe, a.view.Digest, a.r.ToolchainDigest, a.r.SourceDigest, string(a.r.Driver.Flavour)}, args...), "\n")
	if raw, ok := a.r.Cache.Recall("conftest-plan-1", key); ok {
		if plan, err := conftest.ParsePlan(string(raw)); err == nil {
			return plan, nil
		}
	}
	// A copy of the sources: make may do more than it is asked for, and what it
	// does here is done with masks before its eyes.
	src := filepath.Join(a.dir, "src")
	if err := stage(ctx, a.r.Source, src); err != nil {
		return nil, err
	}
	kbuild := filepath.Join(src, "Kbuild")
	was, err := os.ReadFile(kbuild)
	if err != nil || !strings.Contains(string(was), "conftest-verbose") {
		return nil, fmt.Errorf("%w: its Kbuild file is of another shape", errNoAid)
	}
	if err := os.WriteFile(kbuild, append(was, conftest.PlanRules(insideAid+"/plan")...), 0o644); err != nil {
		return nil, err
	}
	box := a.box
	box.Argv, box.Output, box.Binds = slices.Concat(args, []string{"-j1"}), nil, slices.Clone(a.box.Binds)
	for i := range box.Binds {
		if box.Binds[i].Inside == insideSource {
			box.Binds[i].Host = src
		}
	}
	err = sandbox.Run(ctx, box) // ends badly, as the rules say
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	var exit *sandbox.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	if err := os.RemoveAll(src); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(a.dir, "plan"))
	if err != nil {
		return nil, fmt.Errorf("%w: make told no plan", errNoAid)
	}
	plan, err := conftest.ParsePlan(string(text))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAid, err)
	}
	if plan.Sources != insideKernel || plan.Output != insideKernel {
		return nil, fmt.Errorf("%w: it looks at %s", errNoAid, plan.Sources)
	}
	return plan, a.r.Cache.Remember("conftest-plan-1", key, text)
}

// answer finds every answer and lays the files.
func (a *aid) answer(ctx context.Context, script *conftest.Script, plan *conftest.Plan) error {
	asker := conftest.NewAsker(script, plan, conftest.Basis{View: a.view.Digest, Toolchain: a.r.ToolchainDigest, Recipe: Recipe, Macros: a.view.Macros})
	sheet := conftest.Sheet{}
	if raw, ok := a.r.Cache.Recall("conftest-1", asker.SheetKey()); ok {
		sheet = conftest.ReadSheet(raw)
	}
	known := len(sheet)
	for name, text := range map[string]string{
		filepath.Join(a.src, batchScript): string(script.Batch(insideAid)),
		filepath.Join(a.dir, "flags"):     plan.Flags,
		filepath.Join(a.dir, "cc"):        compilerGuard(plan.CC),
	} {
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			return err
		}
	}
	a.watch.expect.conftest = len(plan.Headers) + len(plan.All())

	headers, err := a.ask(ctx, plan, sheet, "prebake_headers", "headers", plan.Headers, asker.HeaderKey)
	if err != nil {
		return err
	}
	for _, f := range plan.Files(headers, nil, "", "") {
		if f.Name == "headers.h" {
			// The version that stands in it is a comment, which nothing sees.
			if err := os.MkdirAll(filepath.Join(a.src, "conftest"), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(a.src, "conftest", "headers.h"), []byte(f.Text), 0o644); err != nil {
				return err
			}
			headers[""] = f.Text
		}
	}
	names := plan.All()
	for _, name := range append(slices.Clone(names), "uts_release") {
		if !script.Knows(name) {
			return fmt.Errorf("%w: the script has no test %s", errNoAid, name)
		}
	}
	tests, err := a.ask(ctx, plan, sheet, "compile_tests", "tests", append(names, "uts_release"), func(name string) string {
		key, _ := asker.TestKey(name, headers[""])
		return key
	})
	if err != nil {
		return err
	}
	patches, err := a.patches(ctx, plan, sheet, asker.PatchesKey())
	if err != nil {
		return err
	}
	if len(sheet) > known {
		if raw := sheet.Bytes(); raw != nil {
			if err := a.r.Cache.Remember("conftest-1", asker.SheetKey(), raw); err != nil {
				return err
			}
		}
	}
	release, err := a.release(tests["uts_release"])
	if err != nil {
		return err
	}
	return a.lay(plan.Files(headers, tests, patches, release))
}

// compilerGuard is a compiler that tells of an end that says nothing about the
// program: a full disk or a killed compiler must not pass for an answer.
func compilerGuard(cc string) string {
	return `#!/bin/sh
exec 3>&1
said=$(` + cc + ` "$@" 2>&1 >&3)
status=$?
case $status in
0) ;;
1) case $said in
	*"No space left"*|*"annot allocate"*|*"memory exhausted"*|*"out of memory"*|*"temporarily unavailable"*|*illed*|*"quota exceeded"*|*"nput/output error"*)
		echo "$said" >> ` + insideAid + `/trouble ;;
	esac ;;
*) echo "status $status: $said" >> ` + insideAid + `/trouble ;;
esac
[ -z "$said" ] || printf '%s\n' "$said" >&2
exit $status
`
}

// ask returns the answers to questions, and adds those that were not known.
func (a *aid) ask(ctx context.Context, plan *conftest.Plan, sheet conftest.Sheet, mode, folder string, names []string, key func(string) string) (map[string]string, error) {
	answers := map[string]string{}
	var open []string
	for _, name := range names {
		if text, ok := sheet[key(name)]; ok {
			answers[name] = text
		} else if !slices.Contains(open, name) {
			open = append(open, name)
		}
	}
	a.watch.reuse(phaseConftest, len(answers))
	if len(open) == 0 {
		return answers, nil
	}
	if err := os.WriteFile(filepath.Join(a.dir, "list"), []byte(strings.Join(open, "\n")+"\n"), 0o644); err != nil {
		return nil, err
	}
	box := a.box
	box.Output = a.watch
	box.Argv = []string{"sh", "-c", `exec xargs -P "$1" -n "$2" /bin/sh ` + insideSource + `/` + batchScript + ` ` + insideAid + `/cc "$3" "$4" "$5" "$6" "$(cat ` + insideAid + `/flags)" < ` + insideAid + `/list`,
		"sh", strconv.Itoa(a.r.Jobs), strconv.Itoa(questionsAtOnce), plan.Arch, plan.Sources, plan.Output, mode}
	if err := sandbox.Run(ctx, box); err != nil {
		return nil, a.given(ctx, err)
	}
	if text, err := os.ReadFile(filepath.Join(a.dir, "trouble")); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the compiler had trouble of its own: %.300s", errNoAid, text)
	}
	for _, name := range open {
		text, err := os.ReadFile(filepath.Join(a.dir, folder, name))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errNoAid, err)
		}
		answers[name], sheet[key(name)] = string(text), string(text)
	}
	return answers, nil
}

// given tells a sandbox's end from the script's.
func (a *aid) given(ctx context.Context, err error) error {
	var exit *sandbox.ExitError
	if context.Cause(ctx) == nil && errors.As(err, &exit) {
		return fmt.Errorf("%w: %w", errNoAid, err)
	}
	return err
}

func (a *aid) patches(ctx context.Context, plan *conftest.Plan, sheet conftest.Sheet, key string) (string, error) {
	if text, ok := sheet[key]; ok {
		return text, nil
	}
	box := a.box
	box.Output = nil
	box.Argv = []string{"sh", "-c", `/bin/sh ` + insideSource + `/` + batchScript + ` "$1" "$2" "$3" "$4" patch_check > ` + insideAid + `/patches`,
		"sh", plan.CC, plan.Arch, plan.Sources, plan.Output}
	if err := sandbox.Run(ctx, box); err != nil {
		return "", a.given(ctx, err)
	}
	text, err := os.ReadFile(filepath.Join(a.dir, "patches"))
	sheet[key] = string(text)
	return string(text), err
}

// release puts the real release where the view had a mask.
func (a *aid) release(answer string) (string, error) {
	text, err := os.ReadFile(filepath.Join(a.r.Headers, "include/generated/utsrelease.h"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNoAid, err)
	}
	strs := quoted.FindAll(text, -1)
	if len(strs) != 1 || strings.Count(answer, maskedString) != 1 {
		return "", fmt.Errorf("%w: utsrelease.h is of another shape", errNoAid)
	}
	return strings.Replace(answer, maskedString, string(strs[0]), 1), nil
}

// lay writes the files of the folder conftest/, each not older than those that
// make says it is made of.
func (a *aid) lay(files []conftest.File) error {
	for _, f := range files {
		path := filepath.Join(a.src, "conftest", f.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(f.Text), 0o644); err != nil {
			return err
		}
		a.laid[f.Name] = f.Text
	}
	return os.Remove(filepath.Join(a.src, batchScript))
}

// kept reports whether make took the laid files as they were.
func (a *aid) kept() bool {
	for name, text := range a.laid {
		now, err := os.ReadFile(filepath.Join(a.src, "conftest", name))
		if err != nil || string(now) != text {
			return false
		}
	}
	return true
}

// digest names the answers, less the comment that tells the release.
func (a *aid) digest() string {
	shown := map[string]string{}
	for name, text := range a.laid {
		if i := strings.LastIndex(text, "// Kernel version: "); i >= 0 {
			text = text[:i]
		}
		shown[name] = text
	}
	raw, err := json.Marshal(shown) // in order of name
	if err != nil {
		return strings.Join(slices.Sorted(maps.Keys(shown)), " ")
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}
