package discover

import (
	"context"
	"errors"
	"fmt"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
)

// Drivers is a source of driver versions: a bucket of NVIDIA's runfiles.
type Drivers struct {
	// URL is the address of the bucket.
	URL string
}

// Name is "drivers".
func (Drivers) Name() string { return "drivers" }

// Look lists the bucket and records its releases.
func (s Drivers) Look(ctx context.Context, to catalogue) (n int, err error) {
	b, err := cosbucket.Open(ctx, s.URL)
	if err != nil {
		return 0, fmt.Errorf("discover drivers: %w", err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	names, err := b.List(ctx, "")
	if err != nil {
		return 0, fmt.Errorf("discover drivers: %w", err)
	}
	seen := map[string]bool{}
	var all []api.DriverRelease
	for _, name := range names {
		version, _, ok := cosbucket.ParseRunfile(name)
		if ok && !seen[version] {
			seen[version] = true
			all = append(all, api.DriverRelease{Version: version, Branch: target.Branch(version)})
		}
	}
	if err := to.RecordDrivers(ctx, all); err != nil {
		return 0, fmt.Errorf("discover drivers: %w", err)
	}
	return len(all), nil
}
