// Command bench measures Prebake's headline numbers. Each number is the ratio of Prebake's result to an alternative's
// result in the same run, because only ratios are comparable between machines. No test depends on a time.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// measurements returns the possible values of --only.
func measurements() []string {
	return []string{"cold", "sibling", "neighbour", "next", "matrix", "node", "fetch", "guest"}
}

// clangMeasurements returns the measurements that --clang makes. The mirror has only one kernel compiled by clang, so
// these are the measurements that need only one kernel.
func clangMeasurements() []string { return []string{"cold", "neighbour", "next"} }

func main() {
	cli.Main(&ucli.Command{
		Name:  "bench",
		Usage: "measure Prebake, plain \"make\" and dkms, and print the ratios of the times",
		Flags: []ucli.Flag{
			&ucli.StringFlag{Name: "bin", Value: "bin", Usage: "`FOLDER` with the product's programs"},
			&ucli.IntFlag{Name: "runs", Value: 1, Usage: "`COUNT` of runs of each measurement; their median is printed"},
			&ucli.StringFlag{Name: "only",
				Usage: "a comma-separated `LIST` of " + strings.Join(measurements(), ", ") + " (default: all)"},
			&ucli.BoolFlag{Name: "plain-once",
				Usage: "run plain \"make\" only for the first cell, and dkms only for one kernel; compare all cells with these"},
			&ucli.BoolFlag{Name: "clang",
				Usage: "measure cold, neighbour and next on one kernel that clang compiled, as at COS; to compile it: make clang"},
			&ucli.IntSliceFlag{Name: "kernel-abi",
				Usage: "the matrix's kernels by ABI `NUMBER` (default: the two oldest and the two newest in Debian's index)"},
		},
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			o := options{bin: cmd.String("bin"), runs: max(1, cmd.Int("runs")), abis: cmd.IntSlice("kernel-abi"),
				clang: cmd.Bool("clang"), plainOnce: cmd.Bool("plain-once"), only: map[string]bool{}}
			list := measurements()
			if o.clang {
				list = clangMeasurements()
			}
			if text := cmd.String("only"); text != "" {
				list = strings.Split(text, ",")
			}
			for _, name := range list {
				if !slices.Contains(measurements(), name) {
					return fault.New(fault.Usage, fmt.Sprintf("there is no measurement %q", name),
						"choose from "+strings.Join(measurements(), ", "))
				}
				if o.clang && !slices.Contains(clangMeasurements(), name) {
					return fault.New(fault.Usage,
						fmt.Sprintf("measure %s: the measurement needs several kernels, but --clang gives only one", name),
						"choose from "+strings.Join(clangMeasurements(), ", "))
				}
				o.only[name] = true
			}
			return run(ctx, o, cmd.Root().Writer)
		},
	})
}

type options struct {
	bin   string
	runs  int
	abis  []int
	clang bool
	// If plainOnce is true, plain `make` runs only for the first cell, and dkms only once for each driver. All other
	// cells are compared with the times of these runs.
	plainOnce bool
	only      map[string]bool
}

// ratio is one line of the printed result: the numbers of Prebake (ours) and of an alternative (theirs).
type ratio struct {
	what, alternative string
	ours, theirs      []float64
	unit              string
}

func (r ratio) print(w io.Writer) {
	if len(r.ours) == 0 || len(r.theirs) == 0 {
		return
	}
	ours, theirs := median(r.ours), median(r.theirs)
	precision := 3
	if ours < 0.01*theirs {
		precision = 5
	}
	fmt.Fprintf(w, "%6.*f  %s\n        %.1f %s; against %.1f %s: %s\n", precision, ours/theirs, r.what, ours, r.unit,
		theirs, r.unit, r.alternative)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "prebake-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := testbed.New(o.bin, dir, os.Stderr)
	if err != nil {
		return err
	}
	b := &bench{Scene: s, options: o, key: filepath.Join(dir, "key"), headers: map[string]string{},
		sources: map[string]string{},
		roles:   map[string]*ratio{"cold": {}, "neighbour": {}, "next": {}, "sibling": {}}}
	if b.mirror, err = b.makeMirror(ctx); err != nil {
		return err
	}
	if _, err := s.Must(ctx, "builder", "keygen", b.key); err != nil {
		return err
	}
	if o.only["fetch"] {
		if err := b.fetch(ctx); err != nil {
			return err
		}
	}
	if o.only["guest"] {
		if err := b.guest(ctx); err != nil {
			return err
		}
	}
	delete(o.only, "fetch")
	delete(o.only, "guest")
	for i := range o.runs {
		if len(o.only) == 0 {
			break // only fetch and guest were wanted, and both are done
		}
		if err := b.measureOnce(ctx, i); err != nil {
			return err
		}
	}
	b.print(out)
	return nil
}

// makeMirror makes a mirror with three drivers of one branch and four kernels: the two oldest, on which all drivers
// compile, and the two newest. With --clang, the mirror has one kernel, compiled by clang.
func (b *bench) makeMirror(ctx context.Context) (*mirror, error) {
	m, kernels := &mirror{Dir: filepath.Join(b.State, "bench-mirror")}, 2
	args := []string{"--neighbour", "--cache", filepath.Join(b.State, "packages")}
	if b.clang {
		m, kernels = &mirror{Dir: filepath.Join(b.State, "bench-clang-mirror")}, 1
		args = append(args, "--only-clang")
	} else if len(b.abis) == 0 {
		args = append(args, "--kernels", "4")
	}
	for _, abi := range b.abis {
		args = append(args, "--kernel-abi", strconv.Itoa(abi))
	}
	if _, err := b.Must(ctx, "mirror", append(args, "--out", m.Dir)...); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(m.Dir, "mirror.json"))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, m); err != nil {
		return nil, fmt.Errorf("read mirror.json: %w", err)
	}
	if !b.clang { // a second COS build of a kernel has the same ABI fingerprint, so builder would compile nothing for it
		m.Builds = slices.DeleteFunc(m.Builds, func(k build) bool { return k.Note != "" })
	}
	if len(m.Builds) < kernels || len(m.Drivers) < 3 {
		return nil, fmt.Errorf("the mirror has %d kernels and %d drivers; want at least %d kernels and 3 drivers",
			len(m.Builds),
			len(m.Drivers), kernels)
	}
	// In order of version, the drivers are: one release, its neighbour, and a later release of the same branch.
	slices.SortFunc(m.Drivers, func(x, y driver) int { return target.CompareVersions(x.Version, y.Version) })
	return m, nil
}
