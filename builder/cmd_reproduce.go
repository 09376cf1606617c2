package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/login"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/reproduce"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/timeline"
)

func reproduceCommand() *ucli.Command {
	return &ucli.Command{
		Name:      "reproduce",
		Usage:     "rebuild a published artifact, and compare it file by file",
		ArgsUsage: "REF…",
		Description: `REF is host/repository or oci:FOLDER, followed by @sha256:DIGEST or by :TAG.
The object cache is not used. The exit status is 0 if all digests are the same,
and 5 (mismatch) if one differs.

Example:
  builder reproduce --public-key prebake.key.pub \
    registry.example/drivers@sha256:DIGEST`,
		Flags: slices.Concat(
			mirrorFlags(),
			cli.Group(groupFrom,
				cli.String("username", "", "user `NAME` for the registry (default: from Docker's configuration)"),
				cli.String("password", "", "`PASSWORD` or token for the registry"),
			),
			cli.Group(groupTrust, cli.Strings("public-key", "trust provenance that the public key in `FILE` verifies")),
			cli.Group(groupTrust, cli.TrustFlags()...),
			cli.Group(groupTrust, cli.String("module-cert", "",
				"`FILE` with the certificate of Google's key, for artifacts of --google-modules if the bucket has no certificate")),
			cli.Group(groupTrust,
				cli.Bool("attest", "if all files are the same, sign an attestation with --key and attach it to the artifact"),
				cli.String("key", "", "`KEY` for --attest: file, KMS URI or keyless:SIGNING_CONFIG"),
				identityTokenFlag(),
				cli.String("builder-id", builderID, "`URI` that names this builder in the attestation"),
			),
			cli.Group(groupResources,
				homeDefault(cli.String("cache", defaultCache(), "`FOLDER` of the cache; only fetched inputs in it are used")),
				cli.Int("jobs", 0, "run `COUNT` compilers at once; 0 means one for each processor"),
				cli.Duration("compile-timeout", 45*time.Minute, "stop the compile after `TIME`"),
			),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: runReproduce,
	}
}

// splitReference splits host/repository@digest or host/repository:tag into repository and digest or tag. The colon
// before a port does not begin a tag.
func splitReference(ref string) (repository, name string, err error) {
	if at := strings.LastIndex(ref, "@"); at > 0 {
		return ref[:at], ref[at+1:], nil
	}
	colon := strings.LastIndex(ref, ":")
	if colon <= strings.LastIndex(ref, "/") || strings.HasPrefix(ref, "oci:") && colon == len("oci") {
		return "", "", fault.New(fault.Usage, fmt.Sprintf("reference %q has neither a digest nor a tag", ref),
			"add @sha256:DIGEST or :TAG")
	}
	return ref[:colon], ref[colon+1:], nil
}

func runReproduce(ctx context.Context, cmd *ucli.Command) (err error) {
	refs := cmd.Args().Slice()
	if len(refs) == 0 {
		return fault.New(fault.Usage, "builder reproduce needs the reference of at least one artifact",
			"run: builder reproduce REPOSITORY@sha256:DIGEST --public-key FILE")
	}
	verifier, err := newVerifier(cmd)
	if err != nil {
		return err
	}
	if cmd.Bool("attest") && cmd.String("key") == "" {
		return fault.New(fault.Usage, "--attest needs a key to sign with",
			"add --key FILE; to make a key, run: builder keygen FILE")
	}
	var all []reproduce.Config
	for _, ref := range refs {
		c := reproduce.Config{Verifier: verifier, By: cmd.String("builder-id")}
		where, name, err := splitReference(ref)
		if err != nil {
			return err
		}
		c.Ref = name
		c.Repo, err = registry.Open(where,
			registry.Options{UserAgent: "prebake-builder/" + version, Username: cmd.String("username"),
				Password: cmd.String("password"), Keychain: login.Keychain()})
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	if cmd.Bool("attest") {
		keys, err := keyOptions(cmd)
		if err != nil {
			return err
		}
		signer, err := sign.LoadSigner(ctx, cmd.String("key"), keys...)
		if err != nil {
			return err
		}
		for i := range all {
			all[i].Attest = signer
		}
	}
	cache, err := cas.Open(cmd.String("cache"))
	if err != nil {
		return fmt.Errorf("open cache: %w", err)
	}
	defer func() { err = errors.Join(err, cache.Close()) }()
	reports, err := reproduceAll(ctx, cmd, cache, all)
	if err != nil {
		return err
	}
	if err := cli.Print(cmd, reports, func(w io.Writer) error { return printReports(w, reports) }); err != nil {
		return err
	}
	var differ []string
	for _, r := range reports {
		if !r.Identical {
			differ = append(differ, r.Digest)
		}
	}
	if len(differ) > 0 {
		return fault.New(fault.Mismatch,
			fmt.Sprintf("reproduce: %d of %d artifacts differ from their rebuilds: %s", len(differ), len(reports),
				strings.Join(differ, ", ")),
			"do not use these artifacts until their publisher has explained the difference")
	}
	return nil
}

// reproduceAll rebuilds one artifact after the other. The cache for build products starts empty, so every file is
// compiled.
func reproduceAll(ctx context.Context, cmd *ucli.Command, cache *cas.Cache,
	all []reproduce.Config) (_ []*reproduce.Report, err error) {
	products, remove, err := pipeline.OpenFresh(cache)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	log, logPath, err := openLog(cache, "reproduce")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	stderr := cmd.Root().ErrWriter
	cfg := pipeline.Config{
		KernelMirror: cmd.String("kernel-mirror"), DriverMirror: cmd.String("driver-mirror"), Cache: cache,
		ModuleCert: cmd.String("module-cert"), Version: version, Jobs: cmd.Int("jobs"),
		CompileTimeout: cmd.Duration("compile-timeout"),
	}
	var reports []*reproduce.Report
	for _, c := range all {
		fmt.Fprintf(stderr, "reproducing %s in %s; full log in %s\n", c.Ref, c.Repo.Name(), logPath)
		c.TempDir = products.TempDir
		c.Make = func(ctx context.Context, req pipeline.Request) (*pipeline.Made, error) {
			return pipeline.Make(ctx, cfg, req, products, log, &timeline.Run{Watch: cli.Progress(stderr)})
		}
		report, err := reproduce.Run(ctx, c)
		if err != nil {
			return nil, err
		}
		reports = append(reports, report)
	}
	return reports, nil
}

func openLog(cache *cas.Cache, name string) (*os.File, string, error) {
	path := filepath.Join(cache.Dir(), "logs", name+".log")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, "", err
	}
	log, err := os.Create(path)
	if err != nil {
		return nil, "", fault.Disk(fmt.Errorf("open the log of the rebuild: %w", err), "free space on the disk of the log")
	}
	return log, path, nil
}

func printReports(w io.Writer, reports []*reproduce.Report) error {
	for i, r := range reports {
		if i > 0 {
			if _, err := fmt.Fprintln(w); err != nil {
				return err
			}
		}
		if err := printReport(w, r); err != nil {
			return err
		}
	}
	return nil
}

func printReport(w io.Writer, r *reproduce.Report) error {
	outcome := "identical: the same digest came out"
	switch {
	case !r.Identical:
		outcome = "DIFFERENT: the rebuild is " + r.Made
	case r.ModuleKey != "":
		outcome = "identical but for the modules' signatures, under certificate\n          " + r.ModuleKey
	}
	built := r.BuilderID
	if !r.BuiltOn.IsZero() {
		built += ", on " + r.BuiltOn.UTC().Format(time.RFC3339)
	}
	if _, err := fmt.Fprintf(w, "artifact  %s@%s\ndriver    %s\nkernel    %s, release %s\nbuilt by  %s\noutcome   %s\n",
		r.Repository, r.Digest, r.Driver, r.Kernel, r.Kernel.Release, built, outcome); err != nil {
		return err
	}
	for _, d := range r.Differences {
		if _, err := fmt.Fprintf(w, "differs   %s: %s\n", d.Name, d.What); err != nil {
			return err
		}
	}
	if r.Attested == "" {
		return nil
	}
	_, err := fmt.Fprintf(w, "attested  %s\n", r.Attested)
	return err
}
