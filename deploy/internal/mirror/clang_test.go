package mirror

import (
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
)

func TestUnmet(t *testing.T) {
	t.Parallel()
	const want = "# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"\"\nCONFIG_D=m\n"
	rows := []struct {
		name, got string
		want      []string
	}{
		{"all of it", "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"\"\nCONFIG_D=m\nCONFIG_E=y\n", nil},
		{"an option that is unknown counts as not set", "CONFIG_A=y\nCONFIG_C=\"\"\nCONFIG_D=m\n", nil},
		{"lost and changed", "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=\"x\"\nCONFIG_D=y\n",
			[]string{"CONFIG_A=y", "# CONFIG_B is not set", "CONFIG_C=\"\"", "CONFIG_D=m"}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(row.want, missingLines(want, row.got)); diff != "" {
				t.Errorf("missingLines differs (-want +got):\n%s", diff)
			}
		})
	}
}

// TestBuiltTree checks which files builtTree takes from a compiled source tree.
func TestBuiltTree(t *testing.T) {
	t.Parallel()
	src := t.TempDir()
	for name, text := range map[string]string{
		"include/config/kernel.release": "6.1.9+\n", "arch/x86/boot/bzImage": "image", "lib/test_module.ko": "ko",
		"lib/test_hmm.ko": "ko", "Makefile": "m", ".config": "c", "Module.symvers": "s",
		"include/generated/autoconf.h": "h", "include/linux/module.h": "h", "scripts/mod/modpost": "ELF",
		"scripts/mod/modpost.o":      "o",
		"scripts/mod/.modpost.o.cmd": "cmd", "scripts/module.lds": "l", "tools/objtool/objtool": "ELF",
		"tools/objtool/check.c": "c",
		"arch/x86/Makefile":     "m", "arch/x86/include/asm/page.h": "h", "arch/x86/kernel/cpu.c": "c",
		"arch/arm/Makefile": "m",
		"drivers/Makefile":  "m", "kernel/fork.c": "c", "vmlinux": "ELF", "arch/Kconfig": "k", "tools/Makefile": "m",
	} {
		path := filepath.Join(src, name)
		mode := fs.FileMode(0o644)
		if text == "ELF" {
			mode = 0o755
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../linux", filepath.Join(src, "include/generated/uapi")); err != nil {
		t.Fatal(err)
	}
	got, err := builtTree(src, "6.1.9+")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, name := range got.paths() {
		if n, ok := got[name]; ok && n.link == "" {
			files = append(files, strings.TrimPrefix(name, "headers/")+map[bool]string{true: "*"}[n.mode == 0o755])
		} else if ok {
			files = append(files, strings.TrimPrefix(name, "headers/")+" -> "+n.link)
		}
	}
	want := []string{
		"boot/modules/test_module.ko", "boot/vmlinuz", ".config", "Makefile", "Module.symvers", "arch/x86/Makefile",
		"arch/x86/include/asm/page.h",
		"include/config/kernel.release", "include/generated/autoconf.h", "include/generated/uapi -> ../linux",
		"include/linux/module.h",
		"scripts/mod/modpost*", "scripts/module.lds", "tools/objtool/objtool*",
	}
	if diff := cmp.Diff(want, files); diff != "" {
		t.Errorf("builtTree differs (-want +got):\n%s", diff)
	}
	if _, err := builtTree(src, "6.1.9"); !fault.Is(err, fault.Internal) {
		t.Errorf("builtTree of another release = %v; want an error", err)
	}
	if err := os.Remove(filepath.Join(src, "scripts/module.lds")); err != nil {
		t.Fatal(err)
	}
	if _, err := builtTree(src, "6.1.9+"); err == nil || !strings.Contains(err.Error(), "scripts/module.lds") {
		t.Errorf("builtTree without module.lds = %v; want an error that names it", err)
	}
}

func TestSigningKey(t *testing.T) {
	t.Parallel()
	m := &maker{Config: Config{Cache: t.TempDir()}}
	first, err := m.signingKey()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(first.cert, first.key)
	if err != nil {
		t.Fatalf("key and certificate do not belong together: %v", err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := cert.PublicKey.(*rsa.PublicKey); !ok || cert.IsCA || cert.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("certificate has a %T, CA %v, use %v; want RSA, for signatures only", cert.PublicKey, cert.IsCA,
			cert.KeyUsage)
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		t.Errorf("certificate is not signed by its own key: %v", err)
	}
	again, err := m.signingKey()
	if err != nil {
		t.Fatal(err)
	}
	if string(first.key) != string(again.key) || string(first.cert) != string(again.cert) {
		t.Error("signingKey made another pair the second time")
	}
	if err := os.WriteFile(filepath.Join(m.Cache, signingFile), first.cert, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.signingKey(); !fault.Is(err, fault.Checksum) {
		t.Errorf("signingKey of half a pair = %v; want checksum", err)
	}
}

func TestClangPick(t *testing.T) {
	t.Parallel()
	rows := map[string]string{
		"usr/lib/llvm-16/bin/clang":                             "bin/clang-16",
		"usr/lib/llvm-16/bin/lld":                               "bin/lld",
		"usr/lib/llvm-16/bin/llvm-objcopy":                      "bin/llvm-objcopy",
		"usr/lib/llvm-16/bin/llvm-objdump":                      "",
		"usr/lib/llvm-16/bin/clang++":                           "",
		"usr/lib/llvm-16/lib/clang/16/include/stdarg.h":         "lib/clang/16/include/stdarg.h",
		"usr/lib/llvm-16/lib/clang/16/include/sanitizer/asan.h": "",
		"usr/lib/llvm-16/lib/libclang-cpp.so.16":                "lib/libclang-cpp.so.16",
		"usr/lib/x86_64-linux-gnu/libclang-cpp.so.16":           "",
		"usr/lib/x86_64-linux-gnu/libLLVM-16.so.1":              "lib/libLLVM-16.so.1",
		"usr/lib/x86_64-linux-gnu/libicuio.so.72.1":             "",
		"lib/x86_64-linux-gnu/libz.so.1":                        "lib/libz.so.1",
		"usr/share/doc/clang-16/copyright":                      "",
	}
	for name, want := range rows {
		if got := clangPick(name); got != want {
			t.Errorf("clangPick(%q) = %q; want %q", name, got, want)
		}
	}
}
