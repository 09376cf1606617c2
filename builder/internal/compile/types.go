package compile

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/builder/internal/untrusted"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/timeline"
)

const (
	insideBTF = "/prebake/vmlinux.btf"
	// pahole is the host's program that makes BTF from debug information. A pahole in the toolchain is never used.
	pahole       = "/usr/bin/pahole"
	hintPahole   = "build without --btf; or install pahole: apt-get install dwarves"
	hintNoTypes  = "build without --btf"
	paholeOutput = 16 << 10
)

var paholeVersion = regexp.MustCompile(`^v([0-9]{1,2})\.([0-9]{1,2})\n$`)

// Pahole returns the version of the host's pahole as pahole prints it, such as v1.24. Another version may make other
// bytes.
func Pahole(ctx context.Context) (string, error) {
	said, err := ask(ctx, sandbox.Config{Dir: "/", Env: environment(tools{})}, pahole, "--version")
	if err != nil {
		return "", programFault(fmt.Errorf("find pahole: %w", err), fault.Usage, hintPahole)
	}
	if !paholeVersion.MatchString(said) {
		return "", fault.New(fault.Usage, fmt.Sprintf(
			"find pahole: pahole says that its version is %.40q; want a version such as v1.24", said),
			hintPahole)
	}
	return strings.TrimSpace(said), nil
}

// paholeNumber returns a version as the kernel's configuration writes it: 124 for v1.24. The version must be a result
// of [Pahole].
func paholeNumber(version string) int {
	parts := paholeVersion.FindStringSubmatch(version + "\n")
	major, _ := strconv.Atoi(parts[1]) // the pattern allows digits only
	minor, _ := strconv.Atoi(parts[2])
	return 100*major + minor
}

// ask runs a program in a sandbox and returns its short output.
func ask(ctx context.Context, box sandbox.Config, argv ...string) (string, error) {
	var said bytes.Buffer
	box.Argv, box.Output, box.MaxOutput = argv, &said, paholeOutput
	if err := sandbox.Run(ctx, box); err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()))
	}
	return said.String(), nil
}

// programFault adds a kind and a hint to the error of a failed program. If the program was killed, the kind is
// fault.OutOfMemory. An error of the sandbox itself stays unchanged.
func programFault(err error, kind fault.Kind, hint string) error {
	var exit *sandbox.ExitError
	switch {
	case !errors.As(err, &exit):
		return err
	case exit.Killed():
		return fault.Wrap(fault.OutOfMemory, err, hintMemory)
	}
	return fault.Wrap(kind, err, hint)
}

// checkTypes returns an error if the request wants BTF and BTF cannot be made. It runs before the compile.
func checkTypes(ctx context.Context, r Request, t tools) error {
	if r.BTF == "" {
		return nil
	}
	if !t.btf {
		return fault.New(fault.Usage, "make BTF: the kernel is configured without CONFIG_DEBUG_INFO_BTF_MODULES", hintNoTypes)
	}
	if t.objcopy == "" {
		return fault.New(fault.InputMissing, "make BTF: the toolchain has no objcopy",
			"publish a toolchain.tar.xz with the binutils of its compiler; or "+hintNoTypes)
	}
	have, err := Pahole(ctx)
	if err != nil {
		return err
	}
	// Since Linux 5.18 the configuration contains the version of the pahole that made the kernel's BTF. The kernel's
	// makefiles choose flags for that version, and an older pahole does not know them.
	if paholeNumber(have) < t.pahole {
		return fault.New(fault.Usage,
			fmt.Sprintf("make BTF: this machine has pahole %s, but pahole v%d.%02d made the kernel's BTF", have,
				t.pahole/100, t.pahole%100),
			fmt.Sprintf("install dwarves %d.%02d or newer; or %s", t.pahole/100, t.pahole%100, hintNoTypes))
	}
	return nil
}

// types adds BTF to the modules that `make` left. Kbuild's own step for this is switched off:
//   - Without vmlinux in the header tree, it only prints a warning.
//   - With vmlinux, it runs resolve_btfids, which header trees lack.
//   - It runs pahole in parallel, which changes the order of the types from run to run.
func (b *build) types(ctx context.Context, result *Result) (err error) {
	built, err := b.moduleFiles()
	if err != nil {
		return err
	}
	phase := timeline.Phase{Name: "types", Start: time.Now().UTC(), Note: count(len(built), "module")}
	defer func() {
		phase.Seconds, phase.Failed = time.Since(phase.Start).Seconds(), err != nil
		result.Phases = append(result.Phases, phase)
	}()
	box := b.box
	box.Binds = append(slices.Clone(box.Binds), sandbox.Bind{Host: b.r.BTF, Inside: insideBTF})
	box.Env = maps.Clone(box.Env)
	box.Env["LLVM_OBJCOPY"] = b.t.objcopy // pahole runs this objcopy to add the section
	flags, err := paholeFlags(ctx, box)
	if err != nil {
		return err
	}
	version, err := Pahole(ctx)
	if err != nil {
		return err
	}
	if paholeNumber(version) >= 124 { // an older pahole does not have the option
		flags = withoutCPP(flags)
	}
	for i, name := range built {
		b.r.Progress("types", i, len(built))
		fmt.Fprintf(b.r.Log, "  BTF     %s %s\n", name, strings.Join(flags, " "))
		if err := wantsNoIDs(b.src, name); err != nil {
			return fmt.Errorf("make BTF of %s: %w", name, err)
		}
		argv := slices.Concat([]string{pahole, "-J"}, flags, []string{"--btf_base", insideBTF, insideSource + "/" + name})
		said, err := ask(ctx, box, argv...)
		if err != nil {
			return programFault(fmt.Errorf("make BTF of %s: %w", name, err), fault.Internal, hintNoTypes)
		}
		fmt.Fprint(b.r.Log, said)
	}
	b.r.Progress("types", len(built), len(built))
	return nil
}

// flagRules is makefile text that prints the kernel's flags for pahole. Since Linux 6.9 a makefile of the kernel
// contains the flags; before, a script prints them. The oldest kernels have no flags.
const flagRules = `
srctree := .
-include include/config/auto.conf
ifneq ($(wildcard scripts/Makefile.btf),)
include scripts/Kbuild.include
include scripts/Makefile.btf
else ifneq ($(wildcard scripts/pahole-flags.sh),)
PAHOLE_FLAGS := $(shell PAHOLE=` + pahole + ` sh scripts/pahole-flags.sh)
ifneq ($(.SHELLSTATUS),0)
$(error scripts/pahole-flags.sh failed)
endif
endif
prebake-flags: ; @echo $(PAHOLE_FLAGS)
`

// paholeFlags returns the kernel's pahole flags without the flags for parallel work.
func paholeFlags(ctx context.Context, box sandbox.Config) ([]string, error) {
	box.Dir = insideKernel
	said, err := ask(ctx, box, "make", "-s", "-f", "/dev/null", "--eval="+flagRules, "prebake-flags")
	if err != nil {
		return nil, programFault(fmt.Errorf("ask the kernel's makefiles for the flags of pahole: %w", err),
			fault.Unsupported, hintNoTypes)
	}
	flags := strings.Fields(said)
	for _, flag := range flags {
		if !paholeFlag.MatchString(flag) {
			return nil, fault.New(fault.Unsupported,
				fmt.Sprintf("ask the kernel's makefiles for the flags of pahole: %.80q is not a plain flag; make printed %.200q",
					flag, said), hintNoTypes)
		}
	}
	return slices.DeleteFunc(flags,
		func(flag string) bool { return strings.HasPrefix(flag, "-j") || strings.HasPrefix(flag, "--jobs") }), nil
}

// withoutCPP adds C++ to the languages whose sources pahole leaves out. BTF has C's types only, and pahole fails at a
// reference type. NVIDIA's makefile adds C++ too, since 575.51.02: the core object of nvidia-modeset has C++ sources.
// The names are those of pahole v1.24, which has one for each version of C++. If a flag occurs twice, pahole uses the
// last one only.
func withoutCPP(flags []string) []string {
	const option = "--lang_exclude="
	out := option + "c++,c++03,c++11,c++14"
	flags = slices.Clone(flags)
	for i, flag := range flags {
		if languages, ok := strings.CutPrefix(flag, option); ok {
			flags[i] = out + "," + languages
			return flags
		}
	}
	return append(flags, out)
}

var paholeFlag = regexp.MustCompile(`^--?[a-z][a-z0-9_,=]*$`)

// wantsNoIDs refuses a module that offers functions to BPF programs. Its section .BTF_ids needs the type numbers of
// these functions, and only the kernel's resolve_btfids can write them.
func wantsNoIDs(dir, name string) (err error) {
	left, err := untrusted.Open(dir)
	if err != nil {
		return err
	}
	defer left.Close()
	file, err := left.Open(name, maxModule)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	f, err := elf.NewFile(file)
	if err != nil {
		return err
	}
	if f.Section(".BTF_ids") != nil {
		return fault.New(fault.Unsupported,
			"the module has a section .BTF_ids, which only the kernel's resolve_btfids can fill in", hintNoTypes)
	}
	return nil
}
