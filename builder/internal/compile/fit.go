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

// hostTools are the programs of a header tree that kbuild runs.
var hostTools = []string{"scripts/basic/fixdep", "scripts/mod/modpost", "scripts/genksyms/genksyms",
	"tools/objtool/objtool"}

// loaders are the dynamic loaders that the sandbox may have, by Go's term for the
// machine; scripts and static programs need none.
var loaders = map[string]string{"amd64": "/lib64/ld-linux-x86-64.so.2", "arm64": "/lib/ld-linux-aarch64.so.1"}

// listNeeds has the loader say what each program needs, and runs none of them.
// The loader's status says nothing: it is 0 where a version is missing.
const listNeeds = `for f in "$@"; do [ -x "$f" ] && "$LOADER" --list "$f" 2>&1; done; exit 0`

var missingLibrary = regexp.MustCompile(`(?m)^\s*(\S+) => not found$`)

// checkFit tells before the first minute of work that this machine, or the image
// that the builder runs in, cannot run what the header archive contains.
func checkFit(ctx context.Context, r Request, t tools) error {
	loader := loaders[runtime.GOARCH]
	if _, err := os.Stat(loader); err != nil {
		return nil //nolint:nilerr // another C library: the compile will tell
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
		return fault.New(fault.Usage, "this machine cannot run the kernel's build tools: they need the library "+m[1],
			"install the package that has it (libelf1 for libelf.so.1), or run the builder in another image")
	}
	return nil
}

// Check reports whether a toolchain and a header tree fit each other and this
// machine, before anything is compiled: the tools that the kernel's configuration
// asks for are there, and the kernel's own build tools run here. Of the request it
// examines Headers, Toolchain, Env and Arch.
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
