package pipeline

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/bootimage"
	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/testgpu"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// boot is the boot folder from which the load test's virtual machine starts.
type boot struct {
	dir string // the path of the folder, whose layout package vm defines; "" means there is no folder
	// key is a digest that covers the folder's content. The cache keys of load test verdicts contain it.
	key string
	// materials are the files from which the folder was made, for the signed test result.
	materials []sign.Material
}

// cosArguments are kernel arguments for a kernel with COS's configuration:
//   - loadpin.exclude switches LoadPin off for modules, with the same words as on COS's own command line.
//   - csm.disabled switches off COS's Container Security Monitor, as COS itself does.
//   - ima_appraise switches off IMA's check of firmware.
//   - hung_task_panic=0 prevents a panic over a task that is slow because of the emulator.
const cosArguments = "loadpin.exclude=kernel-module,firmware csm.disabled=1 ima_appraise=off hung_task_panic=0\n"

// findBoot returns the boot folder for the load test: the bucket's own boot archive, or a folder made from the bucket's
// vmlinux. If there is no boot folder and no error, the second result is the reason. If the vmlinux cannot be booted,
// or comes from another run of `make` than the headers, findBoot returns an error only in the mode LoadTestRequire.
func (r *run) findBoot(ctx context.Context, in *inputs) (b boot, why string, err error) {
	switch {
	case in.kernel.Boot != "":
		return boot{in.kernel.Boot, in.kernel.BootDigest,
			[]sign.Material{{Name: "boot image", Digest: in.kernel.BootDigest}}}, "", nil
	case !in.kernel.HasVMLinux:
		return b, "the bucket has no vmlinux of " + in.kernel.Kernel.String(), nil
	}
	kernels, err := cosbucket.Open(ctx, r.cfg.KernelMirror)
	if err != nil {
		return b, "", err
	}
	defer kernels.Close()
	vmlinux, material, err := cossrc.FetchVMLinux(ctx, kernels, r.cfg.Cache, in.kernel.Kernel, r.progress("load test"))
	if err != nil {
		return b, "", err
	}
	facts, err := readFacts(vmlinux, in)
	if err == nil {
		b, err = r.makeBoot(ctx, in, vmlinux, sign.Material{Name: "vmlinux", URI: material.URI, Digest: material.Digest},
			facts)
	}
	// Both errors below say nothing about the modules, so the build continues if it does not require the load test. Any
	// other mismatch ends the build: the modules may have been compiled against the wrong headers.
	if r.cfg.LoadTest != LoadTestRequire && (errors.Is(err, bootimage.ErrOtherRun) || fault.Is(err, fault.Unsupported)) {
		return boot{}, err.Error(), nil
	}
	return b, "", err
}

// readFacts reads the facts about the kernel from vmlinux. It returns an error if they do not fit the headers that the
// modules were compiled against.
func readFacts(vmlinux string, in *inputs) (facts bootimage.Facts, err error) {
	f, err := os.Open(vmlinux)
	if err != nil {
		return facts, err
	}
	defer f.Close()
	if facts, err = bootimage.ReadFacts(f); err == nil {
		err = facts.Check(in.kernel.Headers)
	}
	return facts, err
}

// factsFile is a file in each boot folder that makeBoot makes. It has the digest of the kernel image, and the build id
// of the vmlinux.
const factsFile = "image.json"

// makeBoot returns a boot folder made from vmlinux, with the emulated GPU compiled for this kernel. The folder is in
// the cache.
func (r *run) makeBoot(ctx context.Context, in *inputs, vmlinux string, from sign.Material,
	facts bootimage.Facts) (boot, error) {
	revision, err := testgpu.Revision()
	if err != nil {
		return boot{}, err
	}
	parts := cas.NewKey("boot").Add("recipe", bootimage.Recipe).Add("vmlinux", from.Digest).Add("headers",
		in.kernel.HeadersDigest).
		Add("toolchain", in.kernel.ToolchainDigest).Add("host tools", in.host).Add("emulated GPU", revision).Add("arguments",
		cosArguments)
	// If the load test is not required, addGPU may leave out the emulated GPU. So a required load test needs another key.
	if r.cfg.LoadTest == LoadTestRequire {
		parts.Add("load test", string(LoadTestRequire))
	}
	key := parts.String()
	dir, _, err := r.cfg.Cache.Tree(ctx, "boot-made-1", key, func(ctx context.Context, dir string) error {
		if err := writeImage(vmlinux, filepath.Join(dir, vm.BootKernel), in.kernel.Kernel.Arch); err != nil {
			return err
		}
		for name, text := range map[string]string{vm.BootOrder: "", vm.BootArgs: cosArguments} {
			file := filepath.Join(dir, filepath.FromSlash(name))
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
				return fault.CacheDisk(err)
			}
		}
		sum, err := hostfile.Sum(filepath.Join(dir, vm.BootKernel))
		if err != nil {
			return err
		}
		raw, err := json.Marshal(map[string]string{"image": "sha256:" + sum, "buildID": facts.BuildID})
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, factsFile), raw, 0o644); err != nil {
			return fault.CacheDisk(err)
		}
		return r.addGPU(ctx, in, dir)
	})
	if err != nil {
		return boot{}, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, factsFile))
	if err != nil {
		return boot{}, err
	}
	var made struct{ Image, BuildID string }
	if err := json.Unmarshal(raw, &made); err != nil {
		return boot{}, err
	}
	fmt.Fprintf(r.log, "the load test boots kernel image %s, made of %s with build id %s: %s\n", made.Image, from.URI,
		made.BuildID, facts.Banners[len(facts.Banners)-1])
	from.BuildID = made.BuildID
	return boot{dir, key, []sign.Material{from, {Name: "boot image", Digest: made.Image}}}, nil
}

func writeImage(vmlinux, to string, arch target.Arch) (err error) {
	in, err := os.Open(vmlinux)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return fault.CacheDisk(err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	return fault.CacheDisk(bootimage.Write(out, in, arch))
}

// addGPU compiles the emulated GPU and copies it into a boot folder. If the GPU's source does not compile against the
// interfaces of this kernel, and the load test is not required, the folder gets no emulated GPU. If the load test is
// required, this is an error.
func (r *run) addGPU(ctx context.Context, in *inputs, dir string) (err error) {
	work, cleanup, err := r.cfg.Cache.TempDir("emugpu-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	path, err := testgpu.Compile(ctx, work, compile.Request{
		Headers: in.kernel.Headers, Toolchain: in.kernel.Toolchain, Env: in.kernel.Env, Release: in.kernel.Kernel.Release,
		Arch: in.kernel.Kernel.Arch, Jobs: r.cfg.Jobs, Log: r.log,
	})
	if fault.Is(err, fault.APIBreak) && r.cfg.LoadTest != LoadTestRequire {
		r.progress("load test")(fmt.Sprintf("the virtual machine gets no emulated GPU: %v", err))
		return nil
	}
	if err != nil {
		return err
	}
	for _, input := range []string{in.kernel.Headers, in.kernel.Toolchain} {
		if err := r.cfg.Cache.Recheck(ctx, input); err != nil {
			return err
		}
	}
	_, err = hostfile.CopySum(filepath.Join(dir, vm.BootGPU), path)
	return fault.CacheDisk(err)
}
