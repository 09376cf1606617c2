package agent

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
)

// cudaLibrary is the path of CUDA's library below the install folder.
const cudaLibrary = "lib64/libcuda.so.1"

// cudaPause is the time between a failed cuInit and a second try. A failure may be short, such as too little memory.
const cudaPause = time.Second

// cudaWatch is what the agent knows about CUDA since the load of the driver.
type cudaWatch struct {
	loaded bool           // this process loaded the driver, so the record is about an earlier load
	works  string         // the digest of the driver with which cuInit succeeded
	answer *gpucheck.CUDA // the answer at that time
	logged string         // the last logged reason why CUDA could not be asked
}

// askCUDA returns what cuInit returns with the driver of this digest, or nil if it cannot be called. After a success,
// cuInit is not called again until the driver is loaded again, even if the fetcher restarts: a node in use must not
// count as unusable because one call failed, such as for a lack of memory. The error is that of a probe that does not
// answer in time.
func (a *Agent) askCUDA(ctx context.Context, digest string) (*gpucheck.CUDA, error) {
	if a.parts.CUDA == nil || a.cfg.NoCUDA {
		return nil, nil
	}
	if rec := a.readRecord(); !a.cuda.loaded && a.cuda.works == "" && rec != nil && rec.BootID == a.bootID() &&
		rec.Verdict.Digest == digest && rec.Verdict.CUDA != nil && rec.Verdict.CUDA.Code == 0 {
		a.cuda.works, a.cuda.answer = digest, rec.Verdict.CUDA
	}
	if a.cuda.works == digest {
		return a.cuda.answer, nil
	}
	library := path.Join(a.cfg.InstallDir, cudaLibrary)
	if _, err := fs.Stat(a.node, library[1:]); err != nil {
		return a.cudaNotAsked(ctx, err), nil
	}
	for try := 1; ; try++ {
		answer, err := a.parts.CUDA.AskCUDA(ctx, library)
		switch {
		case ctx.Err() != nil || errors.Is(err, gpucheck.ErrHung):
			return nil, err
		case err != nil:
			return a.cudaNotAsked(ctx, err), nil
		case answer.Code == 0:
			a.cuda.works, a.cuda.answer = digest, &answer
			return &answer, nil
		case try == 2:
			return &answer, nil
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(cudaPause):
		}
	}
}

// cudaNotAsked logs why CUDA could not be asked, once. This says nothing about CUDA programs in containers, which have
// another C library, so it does not count against the driver.
func (a *Agent) cudaNotAsked(ctx context.Context, err error) *gpucheck.CUDA {
	if err.Error() != a.cuda.logged {
		a.cuda.logged = err.Error()
		a.parts.Log.WarnContext(ctx, "could not check that CUDA programs can start", "err", err)
	}
	return nil
}
