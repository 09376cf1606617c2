package catalogue

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// labelsAtOnce is the number of kernels that one transaction changes. Other writers wait for the transaction.
const labelsAtOnce = 200

// SawGKE records the GKE versions of kernels, by BUILD_ID/board. An empty list removes the stored versions. Unknown
// kernels are ignored.
func (c *Catalogue) SawGKE(ctx context.Context, versions map[string][]string) error {
	for _, all := range versions {
		for _, v := range all {
			if parsed, err := plan.ParseGKE(v); err != nil || parsed != v {
				return fault.New(fault.Usage, fmt.Sprintf("record the GKE versions of kernels: %.40q is not a GKE version", v), "")
			}
		}
	}
	for some := range slices.Chunk(slices.Sorted(maps.Keys(versions)), labelsAtOnce) {
		err := c.Store.Write(ctx, func(tx *store.Tx) error {
			for _, kernel := range some {
				buildID, board, _ := strings.Cut(kernel, "/")
				if err := tx.PutGKE(ctx, buildID, board, versions[kernel]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// gkePattern matches a GKE version, or the beginning of a GKE version.
var gkePattern = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,4}(\.[0-9]{1,4}(-gke\.[0-9]{1,9})?)?$`)

func checkGKE(version string) error {
	if version != "" && !gkePattern.MatchString(version) {
		return fault.New(fault.Usage,
			fmt.Sprintf("GKE version %.40q: want a version such as 1.33.5-gke.1080000, or its beginning", version),
			"write a version such as 1.33")
	}
	return nil
}

// fillBuildID replaces a pool's GKE version by a BUILD_ID, and returns nil. If the version has no kernel or several, it
// returns a resolution that says so.
func (c *Catalogue) fillBuildID(ctx context.Context, pool *api.Pool) (*api.Resolution, error) {
	if pool.GKE == "" {
		return nil, nil
	}
	if pool.BuildID != "" {
		return nil, fault.New(fault.Usage, "the pool has both a COS build and a GKE version",
			"remove one of the pool's fields buildId and gke")
	}
	version, err := plan.ParseGKE(pool.GKE)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err,
			"write a GKE version such as 1.33; to list the kernels of a version, run: server kernels --gke 1.33")
	}
	if _, err := target.ParseKernel("1.0.0", pool.Board); err != nil {
		return nil, fault.Wrap(fault.Usage, err, "write a board such as lakitu")
	}
	f := store.KernelFilter{GKE: version, Board: pool.Board}
	found, _, err := c.Store.Kernels(ctx, f, store.Page{Limit: 2})
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return &api.Resolution{
			Kernel: target.Kernel{Board: pool.Board, Arch: target.BoardArch(pool.Board)}, State: api.Unknown,
			Reason: fmt.Sprintf("this server knows no kernel for board %s that nodes of GKE %s boot", pool.Board, version),
			Hint: "check that the GKE version is right, that the server has --gke-map, and that its --kernel-mirror has the " +
				"COS build; or ask with BUILD_ID instead of the GKE version",
		}, nil
	}
	if len(found) > 1 {
		return &api.Resolution{
			Kernel: target.Kernel{Board: pool.Board, Arch: target.BoardArch(pool.Board)}, State: api.Unknown,
			Reason: fmt.Sprintf("nodes of GKE %s on board %s boot several COS builds, such as %s and %s", version,
				pool.Board, found[0].BuildID, found[1].BuildID),
			Hint: "ask with BUILD_ID instead of the GKE version; to list these COS builds, run: server kernels --gke " +
				version + " --board " + pool.Board,
		}, nil
	}
	pool.BuildID = found[0].BuildID
	return nil, nil
}

// lists returns a kernel's driver lists as a [cosbucket.DriverList], so that server and builder choose by the same
// rule.
func lists(k api.Kernel) cosbucket.DriverList {
	l := driverList(k.Default, k.Latest, k.Branches)
	for gpu, own := range k.GPUs {
		if l.GPUs == nil {
			l.GPUs = map[string]cosbucket.DriverList{}
		}
		l.GPUs[gpu] = driverList(own.Default, own.Latest, own.Branches)
	}
	return l
}

func driverList(first, latest string, branches map[string]string) cosbucket.DriverList {
	return cosbucket.DriverList{Default: first, Latest: latest, Branches: branches,
		Versions: slices.DeleteFunc([]string{first, latest}, func(v string) bool { return v == "" })}
}

// GPULabel is a type of GPU for which a COS build lists a driver version.
type GPULabel struct {
	// GPU is COS's name of the type, such as NVIDIA_L4.
	GPU string
	// Labels are the labels of the version there: default, latest, or a branch such as R535.
	Labels []string
}

// GPULabels returns the types of GPU for which a COS build lists a driver version, sorted by name.
func GPULabels(k api.Kernel, version string) []GPULabel {
	var all []GPULabel
	for gpu, own := range k.GPUs {
		var labels []string
		if own.Default == version {
			labels = append(labels, "default")
		}
		if own.Latest == version {
			labels = append(labels, "latest")
		}
		for branch, v := range own.Branches {
			if v == version {
				labels = append(labels, branch)
			}
		}
		if len(labels) > 0 {
			all = append(all, GPULabel{gpu, labels})
		}
	}
	slices.SortFunc(all, func(a, b GPULabel) int { return cmp.Compare(a.GPU, b.GPU) })
	return all
}
