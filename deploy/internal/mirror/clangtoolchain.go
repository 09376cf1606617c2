package mirror

import (
	"context"
	"io"
	"path"
	"slices"
	"strings"
)

// clangMajor is the major version of clang for the clang-built kernel: the newest in Debian 12.
const clangMajor = "16"

// hostPrefix begins the name of the compiler for programs of the build machine, as in COS's SDK.
const hostPrefix = "x86_64-pc-linux-gnu-"

// clangEnv is the content of toolchain_env, the file in which COS names a kernel's compilers.
const clangEnv = "CC=" + prefix + "clang\nCXX=" + prefix + "clang++\n"

// clangPackages contain the compiler, the linker, LLVM's binary tools, and all their libraries except libc, which comes
// from the machine.
var clangPackages = []string{
	"clang-" + clangMajor, "lld-" + clangMajor, "llvm-" + clangMajor,
	"libclang-cpp" + clangMajor, "libclang-common-" + clangMajor + "-dev", "libllvm" + clangMajor,
	"libbsd0", "libedit2", "libffi8", "libgcc-s1", "libicu72", "liblzma5", "libmd0", "libstdc++6",
	"libtinfo6", "libxml2", "libz3-4", "libzstd1", "zlib1g",
}

// llvmDir is the folder where Debian has the programs without a version in their names.
const llvmDir = "usr/lib/llvm-" + clangMajor

// llvmTools are the binary tools in the archive. llvmLinks maps the second name of a tool to the tool. Debian's
// llvm-objdump is left out: it needs the library of an HTTP client, which needs many others.
var (
	llvmTools = []string{"llvm-ar", "llvm-nm", "llvm-objcopy", "llvm-readobj", "llvm-size", "llvm-strings"}
	llvmLinks = map[string]string{"llvm-ranlib": "llvm-ar", "llvm-strip": "llvm-objcopy", "llvm-readelf": "llvm-readobj"}
)

// makeClangToolchain makes the archive of clang, lld and LLVM's tools.
func (m *maker) makeClangToolchain(ctx context.Context, pkgs []pkg) (object, error) {
	r, err := m.toolchainRecipe(ctx, "clang-toolchain.tar.xz", pkgs)
	if err != nil {
		return object{}, err
	}
	return m.object(ctx, "clang toolchain", r, func(ctx context.Context, w io.Writer) error {
		return m.inWorkDir(func(dir string) error {
			t, err := clangTree(ctx, m.apt, pkgs, dir)
			if err != nil {
				return err
			}
			return t.writeTarXZ(ctx, w, m.xzPreset)
		})
	})
}

// clangTree lays out clang, lld and LLVM's tools under their names in COS's SDK. It contains no binutils, so a build
// cannot use them by mistake.
func clangTree(ctx context.Context, a *apt, pkgs []pkg, work string) (tree, error) {
	t := tree{}
	for _, p := range pkgs {
		file, err := a.mustFile(p)
		if err != nil {
			return nil, err
		}
		if err := readDeb(ctx, t, file, clangPick); err != nil {
			return nil, err
		}
	}
	for _, p := range []string{prefix, hostPrefix} {
		t.add("bin/"+p+"clang", node{link: "clang-" + clangMajor})
		t.add("bin/"+p+"clang++", node{link: "clang-" + clangMajor})
		t.add("bin/"+p+"ld.lld", node{link: "lld"})
	}
	t.add("bin/ld.lld", node{link: "lld"})
	for name, to := range llvmLinks {
		t.add("bin/"+name, node{link: to})
	}
	if err := t.checkLinks(); err != nil {
		return nil, err
	}
	if err := relocate(ctx, t, work); err != nil {
		return nil, err
	}
	return t, t.checkLibraries()
}

// clangPick returns the path in the archive for a file of Debian's packages; "" leaves the file out. The compile of a
// kernel needs no static libraries, sanitizers, headers of C++ and of accelerators, or optimiser plugins.
func clangPick(name string) string {
	if tool, ok := strings.CutPrefix(name, llvmDir+"/bin/"); ok {
		switch {
		case tool == "clang":
			return "bin/clang-" + clangMajor
		case tool == "lld", slices.Contains(llvmTools, tool):
			return "bin/" + tool
		}
		return ""
	}
	// The compiler finds its own headers by a path relative to itself.
	const headers = llvmDir + "/lib/clang/" + clangMajor + "/include/"
	if rest, ok := strings.CutPrefix(name, headers); ok {
		if strings.ContainsRune(rest, '/') || strings.HasPrefix(rest, "__clang_cuda") ||
			strings.HasPrefix(rest, "__clang_hip") {
			return ""
		}
		return "lib/clang/" + clangMajor + "/include/" + rest
	}
	dir, base := path.Dir(name), path.Base(name)
	// Debian has this library in LLVM's own folder, and links to it from other folders.
	if cpp := "libclang-cpp.so." + clangMajor; base == cpp {
		if dir == llvmDir+"/lib" {
			return "lib/" + cpp
		}
		return ""
	}
	for _, unused := range []string{"libicui18n", "libicuio", "libicutest", "libicutu"} {
		if strings.HasPrefix(base, unused) {
			return ""
		}
	}
	if (dir == "usr/lib/x86_64-linux-gnu" || dir == "lib/x86_64-linux-gnu") && strings.Contains(base, ".so") {
		return "lib/" + base
	}
	return ""
}
