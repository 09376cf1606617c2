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
	"github.com/prebake/prebake/pkg/target"
)

// cudaLibrary is the path of CUDA's library below the install folder.
const cudaLibrary = "lib64/libcuda.so.1"

// cudaPause is the time between a failed cuInit and a second try. A failure may be short, such as too little memory.
const cudaPause = time.Second

// cudaWatch is what this process knows about CUDA since it loaded modules last.
type cudaWatch struct {
	due bool // modules were loaded, and cuInit was not called since
	// answer is what cuInit returned with driver. It may be nil although cuInit was due: then it could not be called.
	answer *gpucheck.CUDA
	driver target.Driver
}

// judgeDriver judges the facts about the active driver, and calls cuInit if that is due. It is due after each load, and
// then at each check while its last result keeps the driver from being ready. judgeDriver does not call it again for a
// ready driver: programs may use the GPUs, and one call that lacks memory must not make a node unusable.
func (a *Agent) judgeDriver(ctx context.Context, set *install.Set, f gpucheck.Facts,
	facts *host.Facts) gpucheck.Verdict {
	if a.parts.CUDA == nil || a.cfg.NoCUDA {
		return gpucheck.Judge(f)
	}
	last, due := a.lastCUDA(set)
	usable := gpucheck.Judge(f).State == gpucheck.Ready // as NVML reports
	f.CUDA = last
	failed := gpucheck.Judge(f).State != gpucheck.Ready
	// If a program has nvidia-uvm open, it uses CUDA.
	inUse := slices.ContainsFunc(facts.Modules, func(m host.Module) bool {
		return m.Name == "nvidia_uvm" && m.Refs > len(m.UsedBy)
	})
	if usable && (failed || due && !inUse) {
		if answer := a.askCUDA(ctx); ctx.Err() == nil {
			a.cuda = cudaWatch{answer: answer, driver: set.Driver.Modules()}
			f.CUDA = answer
		}
	}
	return gpucheck.Judge(f)
}

// lastCUDA returns the last result of cuInit since the load of this driver, and whether cuInit is due because there is
// none. If this process loaded modules and has not called cuInit since, cuInit is due. Otherwise the record counts,
// because another process may have written it. Without a record, the last result in this process counts.
func (a *Agent) lastCUDA(set *install.Set) (last *gpucheck.CUDA, due bool) {
	rec := a.readRecord()
	switch {
	case a.cuda.due:
		return nil, true
	case rec != nil && rec.Verdict.Driver.Modules() == set.Driver.Modules():
		last = rec.Verdict.CUDA
		return last, last == nil && rec.Verdict.State != gpucheck.Ready
	case a.cuda.driver == set.Driver.Modules(): // the record could not be written
		return a.cuda.answer, false
	}
	return nil, true // no run has checked this driver since the boot
}

// askCUDA calls cuInit. If the call fails and a second one may pass, askCUDA repeats it once, unless the first took
// more than ten seconds. It returns nil if it cannot call cuInit. A missing result does not count against the driver,
// because programs in containers bring a C library of their own.
func (a *Agent) askCUDA(ctx context.Context) (answer *gpucheck.CUDA) {
	library := path.Join(a.cfg.InstallDir, cudaLibrary)
	if _, err := fs.Stat(a.node, library[1:]); err != nil {
		a.parts.Log.WarnContext(ctx, "could not check that CUDA programs can start", "err", err)
		return nil
	}
	start := a.parts.Now()
	for {
		got, err := a.parts.CUDA.AskCUDA(ctx, library)
		switch {
		case errors.Is(err, gpucheck.ErrHung) && answer == nil:
			return &gpucheck.CUDA{Code: gpucheck.CUDASilent}
		case err != nil && answer == nil:
			a.parts.Log.WarnContext(ctx, "could not check that CUDA programs can start", "err", err)
			return nil
		case err != nil || answer != nil || !got.MayPass() || a.parts.Now().Sub(start) > 10*cudaPause:
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
