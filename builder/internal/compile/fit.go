package compile

import (
	"context"
	"os"
	"regexp"
	"runtime"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
)

// hostTools are the programs in a header tree that kbuild runs during a build.
var hostTools = []string{"scripts/basic/fixdep", "scripts/mod/modpost", "scripts/genksyms/genksyms",
	"tools/objtool/objtool"}

// loaders has the path of glibc's dynamic loader for each GOARCH. A machine with another C library does not have this
// file.
var loaders = map[string]string{"amd64": "/lib64/ld-linux-x86-64.so.2", "arm64": "/lib/ld-linux-aarch64.so.1"}

// listNeeds is a shell script in which the dynamic loader lists each program's libraries without running the program.
// The loader exits with 0 even if a library version is missing, so its exit status is ignored.
const listNeeds = `for f in "$@"; do [ -x "$f" ] && "$LOADER" --list "$f" 2>&1; done; exit 0`

var missingLibrary = regexp.MustCompile(`(?m)^\s*(\S+) => not found$`)

// checkFit returns an error if the programs in the header tree cannot run on this machine: the C library is too old, or
// a library is missing.
func checkFit(ctx context.Context, r Request, t tools) error {
	loader := loaders[runtime.GOARCH]
	if _, err := os.Stat(loader); err != nil {
		return nil //nolint:nilerr // this machine has another C library: the compile reports what is missing
	}
	argv := []string{"sh", "-c", listNeeds, "sh"}
	for _, name := range hostTools {
		argv = append(argv, insideKernel+"/"+name)
	}
	env := environment(t)
	env["LOADER"] = loader
	said, err := ask(ctx, sandbox.Config{Env: env, Dir: "/",
		Binds: []sandbox.Bind{{Host: r.Headers, Inside: insideKernel}}}, argv...)
	if err != nil {
		return err
	}
	for line := range strings.Lines(said) {
		if text := strings.TrimSpace(line); libraryError.MatchString(text) {
			return fault.New(fault.Usage, "this machine cannot run the kernel's build tools: "+relative(text), hintImage)
		}
	}
	if m := missingLibrary.FindStringSubmatch(said); m != nil {
		return fault.New(fault.Usage, "this machine cannot run the kernel's build tools: the tools need the library "+m[1],
			"install the package of this library (libelf1 for libelf.so.1), or run the builder in an image that has it")
	}
	return nil
}

// Check returns an error if a toolchain and a header tree do not fit each other or this machine. It compiles nothing.
// It reads Headers, Toolchain, Env and Arch of the request.
func Check(ctx context.Context, r Request) error {
	t, err := findTools(r)
	if err != nil {
		return err
	}
	if err := sandbox.Probe(ctx); err != nil {
		return err
	}
	return checkFit(ctx, r, t)
}
