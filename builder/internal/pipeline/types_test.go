package pipeline_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/reproduce"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit/btfsample"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/timeline"
)

// typedKernel writes a COS build whose kernel accepts BTF in modules. text is the content of the vmlinux's section
// .text.
func (f *farm) typedKernel(t *testing.T, build, text string) {
	t.Helper()
	files := headerFiles()
	files[headers+".config"] += "CONFIG_DEBUG_INFO_BTF_MODULES=y\n"
	f.kernel(t, build, files)
	tools := toolchainFiles()
	tools["bin/x86_64-cros-linux-gnu-objcopy*"] = "#!/bin/sh\nexec /usr/bin/objcopy \"$@\"\n"
	var toolchain bytes.Buffer
	tarOf(t, tools, xzTo(t, &toolchain))
	for name, data := range map[string][]byte{
		"toolchain.tar.xz": toolchain.Bytes(),
		"vmlinux":          btfsample.ELF(".text", text, ".BTF", string(btfsample.Kernel("int", "task_struct"))),
	} {
		f.put(t, "cos/"+build+"/lakitu/"+name, data)
		f.put(t, "cos/"+build+"/lakitu/"+name+".md5", fmt.Appendf(nil, "%x", md5.Sum(data)))
	}
}

// newTypedFarm returns a farm whose kernel accepts BTF in modules, and whose driver has types.
func newTypedFarm(t *testing.T) *farm {
	t.Helper()
	installed.Programs(t, "pahole", "objcopy")
	f := newFarm(t)
	f.typedKernel(t, "17800.0.9", "first build")
	f.driver(t, typedDriver())
	return f
}

// typedDriver returns the files of a driver whose module has types, so that the module can have BTF.
func typedDriver() map[string]string {
	files := driverFiles()
	files["kernel-open/Makefile"] =
		"modules:\n\t@echo '  CC [M]  nv.o'\n\t@$(CC) $(if $(findstring g0,$(KCFLAGS)),,-g) -c nv.c -o nvidia.ko\n"
	files["kernel-open/nv.c"] += "struct nv_state { int minor; };\nint nv(struct nv_state *s) { return s->minor; }\n"
	return files
}

// salted changes the files of a driver so that each compile gives other bytes.
func salted(files map[string]string) map[string]string {
	files["kernel-open/Makefile"] = strings.Replace(files["kernel-open/Makefile"], "modules:\n",
		"modules:\n\t"+`@echo "const char salt[] = \"$$(date +%N)\";" >>nv.c`+"\n", 1)
	return files
}

// TestBTF checks that a build with BTF makes another artifact than a build without BTF. COS builds with the same kernel
// share the artifact. The provenance names the version of pahole, with which Make must make the same artifact again.
func TestBTF(t *testing.T) {
	t.Parallel()
	f := newTypedFarm(t)
	f.typedKernel(t, "17800.1.9", "second build")
	cfg := f.config(t, emptyCache(t))
	cfg.LoadTest = pipeline.LoadTestOff // with a vmlinux in the bucket, each build would run a load test
	elsewhere := cfg
	elsewhere.Destinations = []string{"oci:" + filepath.Join(t.TempDir(), "layout")}
	plain := must(t, elsewhere, request("17800.0.9"))

	cfg.BTF = true
	first, log, err := build(t, cfg, request("17800.0.9"))
	if err != nil || first.Reused || first.Digest == plain.Digest || first.Fingerprint == plain.Fingerprint ||
		!strings.Contains(log, "  BTF     nvidia.ko") {
		t.Fatalf("with BTF: %+v, %v; want another artifact than %+v, for another fingerprint\n%s", first, err, plain, log)
	}
	if twin := must(t, cfg, request("17800.1.9")); !twin.Reused || twin.Digest != first.Digest {
		t.Errorf("another build of the kernel: %+v; want %s", twin, first.Digest)
	}
	cfg.BTF = false
	if res, _, err := build(t, cfg, request("17800.0.9")); !fault.Is(err, fault.PublishRefused) {
		t.Errorf("without BTF, where it is published with: %+v, %v; want it refused", res, err)
	}

	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	report, err := reproduce.Run(t.Context(), reproduce.Config{
		Repo: repo, Ref: first.Digest, Verifier: f.verifier(t),
		TempDir: func(string) (string, func() error, error) {
			dir, err := os.MkdirTemp(t.TempDir(), "")
			return dir, func() error { return os.RemoveAll(dir) }, err
		},
		Make: func(ctx context.Context, r pipeline.Request) (*pipeline.Made, error) {
			return pipeline.Make(ctx, cfg, r, emptyCache(t), io.Discard, &timeline.Run{})
		},
	})
	if err != nil || !report.Identical {
		t.Errorf("reproduce = %+v, %v; want it identical", report, err)
	}
	other := request("17800.0.9")
	other.BTF = "v0.99"
	if _, err := pipeline.Make(t.Context(), cfg, other, emptyCache(t), io.Discard, &timeline.Run{}); !fault.Is(err,
		fault.Unsupported) || fault.Hint(err) == "" {
		t.Errorf("Make with BTF of another pahole = %v; want unsupported, with a hint", err)
	}
}
