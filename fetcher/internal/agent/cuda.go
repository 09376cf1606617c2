package agent

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"slices"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/fault"
)

// cudaLibrary is the path of CUDA's library below the install folder.
const cudaLibrary = "lib64/libcuda.so.1"

// cudaPause is the time between a failed cuInit and a second try. A failure may be short, such as too little memory.
const cudaPause = time.Second

// checkTime is the longest time of NVML and CUDA together in one check.
const checkTime = 2 * time.Minute

// errSlow is the error of a check that took longer than checkTime.
var errSlow = fault.Wrap(fault.Unusable, gpucheck.ErrHung, "read the kernel log: dmesg | grep NVRM")

// judgeDriver judges the facts about the active driver, and calls cuInit if that is due. It is due after each load, and
// then at each check until it succeeds. Otherwise programs may use the GPUs already, and a node in use must not count
// as unusable because one call failed, such as for a lack of memory. ctx limits NVML and CUDA together.
func (a *Agent) judgeDriver(ctx context.Context, set *install.Set, f gpucheck.Facts,
	facts *host.Facts) gpucheck.Verdict {
	last, due := a.lastCUDA(set, facts)
	v := gpucheck.Judge(f)
	if due && v.State == gpucheck.Ready {
		f.CUDA, a.cudaDue = a.askCUDA(ctx), false
	} else {
		f.CUDA = last
	}
	return gpucheck.Judge(f)
}

// lastCUDA returns the recorded answer of cuInit since the load of this driver, and whether cuInit must be called.
func (a *Agent) lastCUDA(set *install.Set, facts *host.Facts) (last *gpucheck.CUDA, due bool) {
	if a.parts.CUDA == nil || a.cfg.NoCUDA {
		return nil, false
	}
	rec := a.readRecord()
	switch {
	case a.cudaDue:
		return nil, true
	case rec == nil || rec.Verdict.Driver.Modules() != set.Driver.Modules():
		// No run has checked this driver since the boot, or it was another installer's until now. A CUDA program may run.
		return nil, !slices.ContainsFunc(facts.Modules, func(m host.Module) bool {
			return m.Name == "nvidia_uvm" && m.Refs > len(m.UsedBy)
		})
	}
	last = rec.Verdict.CUDA
	return last, last != nil && last.Code != 0 && rec.Verdict.State != gpucheck.Ready
}

// askCUDA calls cuInit, and once more if it failed. It returns nil if it cannot call cuInit. This does not count
// against the driver, because programs in containers bring a C library of their own.
func (a *Agent) askCUDA(ctx context.Context) (answer *gpucheck.CUDA) {
	library := path.Join(a.cfg.InstallDir, cudaLibrary)
	if _, err := fs.Stat(a.node, library[1:]); err != nil {
		a.parts.Log.WarnContext(ctx, "could not check that CUDA programs can start", "err", err)
		return nil
	}
	for {
		got, err := a.parts.CUDA.AskCUDA(ctx, library)
		switch {
		case errors.Is(err, gpucheck.ErrHung) && answer == nil:
			return &gpucheck.CUDA{Code: gpucheck.CUDASilent}
		case err != nil && answer == nil:
			a.parts.Log.WarnContext(ctx, "could not check that CUDA programs can start", "err", err)
			return nil
		case err != nil || answer != nil || !got.MayPass():
			if err == nil {
				answer = &got
			}
			return answer
		}
		answer = &got
		select {
		case <-ctx.Done():
			return answer
		case <-time.After(cudaPause):
		}
	}
}
