package discover

import (
	"context"
	"errors"
	"fmt"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// Mirror looks up single COS builds, for callers that cannot wait until the sources are read again.
type Mirror struct {
	// URL is the address of the bucket of COS releases.
	URL string
}

// Build reads one COS build with all its boards. If the mirror lacks it, the error has kind InputMissing.
func (m Mirror) Build(ctx context.Context, buildID string) (all []api.Kernel, err error) {
	b, err := cosbucket.Open(ctx, m.URL)
	if err != nil {
		return nil, fmt.Errorf("look up COS build %s: %w", buildID, err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	kernels, err := b.BuildsOf(ctx, []string{buildID})
	if err != nil {
		return nil, fmt.Errorf("look up COS build %s: %w", buildID, err)
	}
	for _, k := range kernels {
		entry, err := readKernel(ctx, b, k)
		if err != nil {
			return nil, err
		}
		all = append(all, entry)
	}
	if len(all) == 0 {
		return nil, fault.New(
			fault.InputMissing,
			"the mirror has no COS build "+buildID,
			"check that BUILD_ID is right, and that the server's --kernel-mirror has this COS build",
		)
	}
	return all, nil
}
