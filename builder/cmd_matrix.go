package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	ucli "github.com/urfave/cli/v3"
	"golang.org/x/sync/semaphore"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/builder/internal/nvsrc"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/builder/internal/telemetry"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// wishFlags returns the flags of the commands build and work that have an effect only with --wish.
func wishFlags() []ucli.Flag {
	return slices.Concat(
		cli.Group(groupWhat, cli.Bool("retry-failed", "with --wish: retry failed cells even if no input changed")),
		cli.Group(groupResources,
			cli.Range("parallel", 0, 0, 1000, "with --wish: build `COUNT` cells at once; 0 means as many as memory allows"),
			cli.Range("attempts", 3, 1, 100, "with --wish: try a cell up to `COUNT` times if its failure is temporary"),
		),
	)
}

func wishFlag() ucli.Flag {
	return cli.String("wish", "", "`FILE` with the wish list: which drivers for which kernels")
}

// oneOf returns an error unless exactly one of two flags is set.
func oneOf(cmd *ucli.Command, a, b string) error {
	if (cmd.String(a) == "") == (cmd.String(b) == "") {
		what := "neither --" + a + " nor --" + b + " is given"
		if cmd.String(a) != "" {
			what = "both --" + a + " and --" + b + " are given"
		}
		return cli.About(fault.New(fault.Usage, what, "give one of these two flags; see "+cmd.FullName()+" --help"), a, b)
	}
	return nil
}

func wishCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "wish",
		Usage: "check wish lists",
		Commands: []*ucli.Command{
			{
				Name: "check", Usage: "check a wish list, and print every mistake", ArgsUsage: "FILE",
				Action: func(_ context.Context, cmd *ucli.Command) error {
					if cmd.Args().Len() != 1 {
						return fault.New(fault.Usage, "builder wish check takes one file name", "run: builder wish check wish.yaml")
					}
					w, err := readWish(cmd.Args().First())
					if err != nil {
						return err
					}
					_, err = fmt.Fprintf(
						cmd.Root().Writer,
						"%s: %d kernel wishes × %d driver wishes\n",
						cmd.Args().First(),
						len(w.Kernels),
						len(w.Drivers),
					)
					return err
				},
			},
			{
				Name: "schema", Usage: "print the JSON Schema of wish lists, for editors",
				Action: func(_ context.Context, cmd *ucli.Command) error {
					_, err := cmd.Root().Writer.Write(plan.Schema())
					return err
				},
			},
		},
	}
}

// planCommand returns the command that prints the cells of a wish list. The command accepts those flags of the command
// build that a plan uses. A plan neither publishes nor signs, so some of these flags have a help text of their own.
func planCommand() *ucli.Command {
	own := slices.Concat(
		cli.Group(groupWhat, cli.Range("max-age", 0, 0, 36500,
			"do not count an artifact as published if its build is more than `DAYS` days old")),
		cli.Group(groupTo, cli.Strings("to", "look for artifacts in `REF`: host/repository, oci:FOLDER, or a bucket")),
		cli.Group(groupTrust,
			cli.String("key", "", "count as published only what `KEY` signed: file, KMS URI or keyless:SIGNING_CONFIG"),
			cli.Choice("load-test", pipeline.LoadTestAuto,
				"with require, count as published only artifacts that passed the load test: `MODE` is auto, require or off",
				pipeline.LoadTestAuto, pipeline.LoadTestRequire, pipeline.LoadTestOff)),
	)
	shared := []string{"kernel-mirror", "driver-mirror", "private", "redistribute", "username", "password",
		"identity-token", "trusted-root", "cache"}
	flags := cli.Group(groupWhat, wishFlag())
	for _, f := range pipelineFlags() {
		name := f.Names()[0]
		if i := slices.IndexFunc(own, func(o ucli.Flag) bool { return o.Names()[0] == name }); i >= 0 {
			flags = append(flags, own[i])
		} else if slices.Contains(shared, name) {
			flags = append(flags, f)
		}
	}
	return &ucli.Command{
		Name:  "plan",
		Usage: "print the cells of a wish list, and which of them are published",
		Flags: append(flags, cli.Group(groupOutput, cli.OutputFlag())...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := requireFlags(cmd, "wish", "to", "key"); err != nil {
				return err
			}
			return runPlan(ctx, cmd)
		},
	}
}

const hintWish = "check the name of the file; docs/examples/wish.yaml is an example of a wish list"

func readWish(file string) (*plan.Wish, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read wish list: %w", err), hintWish)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, plan.MaxFile+1))
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read wish list: %w", err), hintWish)
	}
	return plan.Parse(file, text)
}

// matrix has what is needed to build a wish list: the settings, the open buckets and the open destinations.
type matrix struct {
	cfg              pipeline.Config
	batch            batch.Config
	kernels, drivers *cosbucket.Bucket
	destinations     *batch.Destinations
	telemetry        *telemetry.Telemetry // if nil, nothing is recorded
}

func openMatrix(ctx context.Context, cmd *ucli.Command) (_ *matrix, err error) {
	m := &matrix{}
	if m.cfg, err = pipelineConfig(cmd); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	if m.kernels, err = cosbucket.Open(ctx, m.cfg.KernelMirror); err != nil {
		return nil, err
	}
	if m.drivers, err = cosbucket.Open(ctx, m.cfg.DriverMirror); err != nil {
		return nil, err
	}
	if m.destinations, err = openDestinations(ctx, m.cfg); err != nil {
		return nil, err
	}
	m.batch.Parallel, m.cfg.Jobs = batch.Size(cmd.Int("parallel"), m.cfg.Jobs, batch.Cores(), batch.FreeMemory("/"))
	if ahead := batch.ExtraCells(cmd.Int("parallel"), m.batch.Parallel, batch.FreeMemory("/")); ahead > 0 {
		m.cfg.Compiling = semaphore.NewWeighted(int64(m.batch.Parallel))
		m.batch.Parallel += ahead
	}
	m.batch.Attempts = cmd.Int("attempts")
	m.batch.Logs = filepath.Join(m.cfg.Cache.Dir(), "logs")
	// Destinations.Published does not check who signed the modules, or whether debug symbols and BTF exist. If a setting
	// asks for these, the pipeline examines every cell.
	if m.cfg.ModuleKey == "" && !m.cfg.GoogleModules &&
		cmp.Or(m.cfg.GoogleSignatures, pipeline.GoogleAuto) == pipeline.GoogleAuto &&
		!m.cfg.DebugSymbols &&
		!m.cfg.BTF {
		m.batch.Published = m.destinations.Published
	}
	failures, err := failureStore(ctx, m.cfg, m.kernels, m.drivers)
	if err != nil {
		return nil, err
	}
	m.batch.Failures = failures
	if failures.Forget = cmd.Bool("retry-failed"); failures.Forget {
		m.cfg.RetrySince = time.Now()
	}
	// Labels depend on all cells together, so the method setLabels sets them after the last build.
	m.cfg.LabelsLater = true
	m.batch.Make = func(ctx context.Context, c plan.Cell, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
		ctx, end := m.telemetry.Cell(ctx, telemetry.Cell{
			Kernel: c.Kernel.String(), Driver: c.Driver.Version, Flavour: string(c.Driver.Flavour), EarlyWarning: c.EarlyWarning,
		}, line)
		res, err := pipeline.Run(ctx, m.cfg, pipeline.Request{
			BuildID: c.Kernel.BuildID, Board: c.Kernel.Board, Driver: target.Wish(c.Driver.Version), Flavour: c.Driver.Flavour,
		}, log, line)
		end(err)
		// An error of trimCaches does not change the result of the build.
		if terr := trimCaches(ctx, cmd, m.cfg); terr != nil {
			fmt.Fprintf(log, "cache not trimmed: %v\n", terr)
		}
		return res, err
	}
	m.batch.Kernel = func(ctx context.Context, k target.Kernel, say func(string)) (target.Fingerprint, error) {
		in, err := cossrc.Fetch(ctx, m.kernels, m.cfg.Cache, k.BuildID, k.Board, say, m.cfg.KernelOptions()...)
		if err != nil {
			return "", err
		}
		return in.Fingerprint, nil
	}
	m.batch.Driver = func(ctx context.Context, version string, arch target.Arch, say func(string)) ([]target.Flavour,
		error) {
		release, err := nvsrc.Fetch(ctx, m.drivers, m.cfg.Cache, version, arch, say)
		if err != nil {
			return nil, err
		}
		return release.Flavours, nil
	}
	return m, nil
}

// openDestinations opens the destinations and loads the signing key. Through the returned Destinations, a cell counts
// as published only if this key signed the statements about the cell's artifact.
func openDestinations(ctx context.Context, cfg pipeline.Config) (*batch.Destinations, error) {
	signer, err := sign.LoadSigner(ctx, cfg.Key, cfg.KeyOptions...)
	if err != nil {
		return nil, err
	}
	policy := signer.Policy()
	policy.MaxAge = cfg.RebuildAfter
	if cfg.LoadTest == pipeline.LoadTestRequire {
		policy.LoadTest = trust.LoadTestTested
	}
	p := &batch.Destinations{Signer: signer}
	if p.Verifier, err = trust.NewVerifier(policy); err != nil {
		return nil, err
	}
	for _, dest := range cfg.Destinations {
		if tarball.Is(dest) {
			b, err := tarball.Open(ctx, dest)
			if err != nil {
				return nil, errors.Join(err, p.Close())
			}
			p.Buckets = append(p.Buckets, b)
			continue
		}
		repo, err := registry.Open(dest, cfg.RegistryOptions(dest))
		if err != nil {
			return nil, errors.Join(err, p.Close())
		}
		p.Repositories = append(p.Repositories, repo)
	}
	return p, nil
}

// checkPlaces opens the destinations and loads the keys once. So a wrong destination or key ends the program before it
// fetches the inputs of a build.
func checkPlaces(ctx context.Context, cfg pipeline.Config) error {
	p, err := openDestinations(ctx, cfg)
	if err != nil {
		return err
	}
	if err := p.Close(); err != nil {
		return err
	}
	if cfg.ModuleKey == "" {
		return nil
	}
	_, err = modsign.Load(ctx, cfg.ModuleKey, cfg.ModuleCert)
	return err
}

func (m *matrix) close() error {
	var errs []error
	if m.kernels != nil {
		errs = append(errs, m.kernels.Close())
	}
	if m.drivers != nil {
		errs = append(errs, m.drivers.Close())
	}
	if m.destinations != nil {
		errs = append(errs, m.destinations.Close())
	}
	return errors.Join(append(errs, m.telemetry.Close(), m.cfg.Cache.Close())...)
}

// plan returns the current cells of a wish list. The bucket of kernels says which kernels exist, and which drivers COS
// lists for them.
func (m *matrix) plan(ctx context.Context, w *plan.Wish) (*plan.Plan, error) {
	images, err := plan.LoadImageMap(ctx, w.ImageMap)
	if err != nil {
		return nil, err
	}
	return plan.Expand(ctx, w, m.kernels, images)
}

// openPlan reads the wish list, opens the buckets and destinations, and plans the cells. The caller closes the matrix.
func openPlan(ctx context.Context, cmd *ucli.Command) (*matrix, *plan.Plan, error) {
	w, err := readWish(cmd.String("wish"))
	if err != nil {
		return nil, nil, err
	}
	m, err := openMatrix(ctx, cmd)
	if err != nil {
		return nil, nil, err
	}
	p, err := m.plan(ctx, w)
	if err != nil {
		return nil, nil, errors.Join(err, m.close())
	}
	return m, p, nil
}

// runPass builds the cells of a plan that are not published now. The builds that replace artifacts older than --max-age
// share a cache that exists only during this pass; see [pipeline.OpenFresh]. If that cache cannot be removed, runPass
// returns the report and an error.
func (m *matrix) runPass(ctx context.Context, p *plan.Plan) (report *batch.Report, err error) {
	if m.cfg.RebuildAfter > 0 {
		var remove func() error
		if m.cfg.Fresh, remove, err = pipeline.OpenFresh(m.cfg.Cache); err != nil {
			return nil, err
		}
		defer func() {
			m.cfg.Fresh = nil
			err = errors.Join(err, remove())
		}()
	}
	return batch.Run(ctx, m.batch, p), nil
}

// runPlan prints the state of each cell of the wish list, and builds nothing.
func runPlan(ctx context.Context, cmd *ucli.Command) (err error) {
	m, p, err := openPlan(ctx, cmd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	report, err := batch.Status(ctx, m.batch, p)
	if err != nil {
		return err
	}
	notes, err := m.licenceNotes(ctx, p)
	if err != nil {
		return err
	}
	report.Notes = append(report.Notes, notes...)
	return show(cmd, report, 0)
}

// runBuildWish builds the cells of a wish list that are not published yet.
func runBuildWish(ctx context.Context, cmd *ucli.Command) (err error) {
	if cmd.Bool("dry-run") {
		return runPlan(ctx, cmd)
	}
	begin := time.Now()
	m, p, err := openPlan(ctx, cmd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	stderr := cmd.Root().ErrWriter
	beside := ""
	if m.cfg.Compiling != nil {
		beside = " (one of them in a step that does not compile)"
	}
	fmt.Fprintf(
		stderr,
		"%s, %d at the same time%s, with %d compilers each; logs in %s\n",
		cellsOf(len(p.Cells)),
		m.batch.Parallel,
		beside,
		m.cfg.Jobs,
		m.batch.Logs,
	)
	if m.telemetry, err = startTelemetry(ctx, cmd, m.cfg.Cache, slog.New(slog.NewTextHandler(stderr, nil))); err != nil {
		return err
	}
	screen := newScreen(stderr)
	m.cfg.Cache.Notify, m.batch.Watch = screen.progress, screen.watch
	report, err := m.runPass(ctx, p)
	screen.close()
	if report == nil {
		return err
	}
	if err := show(cmd, report, time.Since(begin)); err != nil {
		return err
	}
	if n := report.Early(); n > 0 {
		fmt.Fprintf(stderr, "note:  early warning: %s failed; early warnings do not change the exit code\n", cellsOf(n))
	}
	return errors.Join(report.Err(),
		m.setLabels(ctx, p, func(note string) { fmt.Fprintf(stderr, "note:  %s\n", note) }), err)
}

func show(cmd *ucli.Command, r *batch.Report, took time.Duration) error {
	for _, note := range r.Notes {
		fmt.Fprintf(cmd.Root().ErrWriter, "note:  %s\n", note)
	}
	return cli.Print(cmd, r, func(w io.Writer) error { return printMatrix(w, r, took) })
}
