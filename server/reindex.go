package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// difference is one way in which registry and catalogue differ.
type difference string

// The comments say which artifacts reindex records with --apply.
const (
	missing    difference = "missing"    // a verified artifact is not in the catalogue; recorded by --apply
	attested   difference = "attested"   // a verified artifact has kernels that its record lacks; recorded by --apply
	differs    difference = "differs"    // the artifact contradicts its record; --apply changes only the repository
	absent     difference = "absent"     // the registry lacks an artifact; --apply forgets it in the server's own registry
	unverified difference = "unverified" // no trusted signer says what the artifact is; never recorded
	lost       difference = "lost"       // only the bucket has the driver, as a tarball; it has to be built again
)

// finding is a difference of one artifact.
type finding struct {
	Digest     string          `json:"digest,omitempty"` // empty if the finding is about a bucket's index
	Difference difference      `json:"difference"`
	Driver     target.Driver   `json:"driver,omitzero"`
	Kernels    []target.Kernel `json:"kernels,omitempty"` // the kernels to record, or to build for
	Note       string          `json:"note,omitempty"`
	Applied    bool            `json:"applied,omitempty"`

	add    *api.NewArtifact // what --apply adds to the catalogue; nil means nothing
	forget bool             // --apply removes the artifact from the catalogue
}

// comparison is the result that reindex prints.
type comparison struct {
	Repository string `json:"repository"`
	// InRegistry and InCatalogue are the numbers of artifacts of this repository in the registry and in the catalogue.
	InRegistry  int `json:"inRegistry"`
	InCatalogue int `json:"inCatalogue"`
	// Bucket is the URL of the compared bucket; "" means none. InBucket is the number of its tarballs.
	Bucket   string    `json:"bucket,omitempty"`
	InBucket int       `json:"inBucket,omitempty"`
	Findings []finding `json:"findings"`
	// LeftOut is the number of attached manifests that an import did not send.
	LeftOut int `json:"leftOut,omitempty"`

	held []artifact
}

// signerFlags returns the flags that say which signers are trusted.
func signerFlags() []ucli.Flag {
	keys := cli.WasCalled(cli.Strings("public-key", "`FILE` with public keys of trusted publishers"), "key")
	return append(cli.Group(cli.Trust, keys), cli.Group(cli.Trust, cli.IdentityFlags()...)...)
}

// reindexCommand returns the command that compares the catalogue with a registry. It writes through the API of a
// running server, so it works with each database and registry. After the loss of a database, start the server first: it
// makes an empty database.
func reindexCommand() *ucli.Command {
	return &ucli.Command{
		Name: "reindex", Usage: "compare the catalogue with a registry, and add artifacts that only the registry has",
		Description: `reindex reads each tagged artifact of a repository with its attestations, and
verifies them as a node does. Then it lists the differences between repository
and catalogue, each with its kind:
  missing     a verified artifact is not in the catalogue
  attested    a verified artifact is for more kernels than the catalogue says
  differs     the catalogue has other facts about an artifact
  absent      an artifact is in the catalogue, and not in the repository
  unverified  no trusted signer signed the artifact
  lost        only --bucket has the driver, as a tarball; build it again
With --apply, reindex records the kinds missing and attested. If an artifact
differs only in its repository, and REPOSITORY is the server's
--public-repository, reindex records that. It forgets the published artifacts
that are absent from the server's own registry. Withdrawn artifacts stay.

A bucket with published tarballs shows what a registry lost. The tarballs are
not recorded, because nodes fetch artifacts from a registry.

Only the catalogue has yanks. If the catalogue was lost without a backup, every
artifact comes back as published. Yank again those that were yanked.

The exit status is 0 if no difference is left, 4 if an artifact is unverified,
and 5 if other differences were not recorded.

Example:
  server reindex --public-key farm.pub
  server reindex --public-key farm.pub --apply --token-file token`,
		Flags: append(signerFlags(), writeFlags(
			cli.String("repository", "/prebake/driver", "`REPOSITORY` to read: HOST/NAME, or /NAME on the server itself"),
			cli.String("bucket", "", "also read published tarballs from the bucket at `URL`: gs://, https:// or file://"),
			&ucli.BoolFlag{Name: "apply",
				Usage: "record the artifacts of the kinds \"missing\" and \"attested\"; forget those that " +
					"the server's registry lacks"},
		)...),
		Action: func(ctx context.Context, cmd *ucli.Command) (err error) {
			if err := noArgs(cmd); err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			verifier, err := publisherVerifier(cmd)
			if err != nil {
				return err
			}
			name := cmd.String("repository")
			repo, err := openRepository(c.Base(), name)
			if err != nil {
				return err
			}
			url, tarballs := cmd.String("bucket"), (*cosbucket.Bucket)(nil)
			if url != "" {
				if tarballs, err = cosbucket.Open(ctx, url); err != nil {
					return err
				}
				defer func() { err = errors.Join(err, tarballs.Close()) }()
			}
			found, err := compare(ctx, c, &reader{repo: repo, verifier: verifier, now: time.Now()}, name)
			if err != nil {
				return fmt.Errorf("compare the catalogue with %s: %w", name, err)
			}
			if tarballs != nil {
				if err := found.addBucket(ctx, url, &bucket{tarballs, verifier}); err != nil {
					return err
				}
			}
			var failed error
			if cmd.Bool("apply") {
				failed = found.apply(ctx, c)
			}
			if err := cli.Print(cmd, found, func(w io.Writer) error { return printComparison(w, found) }); err != nil {
				return err
			}
			return errors.Join(failed, found.remainingError())
		},
	}
}

// publisherVerifier returns a verifier that trusts the signers of [signerFlags].
func publisherVerifier(cmd *ucli.Command) (*trust.Verifier, error) {
	var p trust.Policy
	for _, file := range cmd.StringSlice("public-key") {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, fault.Wrap(
				fault.Usage,
				fmt.Errorf("read trusted keys: %w", err),
				"give the file with the publisher's public key: --public-key FILE",
			)
		}
		keys, err := trust.ParsePublicKeys(text)
		if err != nil {
			return nil, fmt.Errorf("read trusted keys %s: %w", file, err)
		}
		p.Keys = append(p.Keys, keys...)
	}
	who := trust.Identity{Subject: cmd.String("certificate-identity"), Issuer: cmd.String("certificate-oidc-issuer")}
	if file := cmd.String("trusted-root"); file != "" {
		var err error
		if p.Root, err = trust.ReadRoot(file); err != nil {
			return nil, err
		}
	}
	if (who != trust.Identity{}) {
		p.Identities = []trust.Identity{who}
	}
	return trust.NewVerifier(p)
}

// openRepository opens a repository by its name in the catalogue. It sends no token, because another registry must not
// see the server's token.
func openRepository(base, repository string) (*registry.Repository, error) {
	if !strings.HasPrefix(repository, "/") {
		return registry.Open(repository, registry.Options{UserAgent: "prebake-server/" + version})
	}
	scheme, host, _ := strings.Cut(base, "://")
	return registry.Open(host+repository,
		registry.Options{Plain: scheme == "http", UserAgent: "prebake-server/" + version})
}

// compare reads the registry, then the catalogue. A builder may publish an artifact in between. Therefore compare asks
// the registry again for each artifact that seems to be absent.
func compare(ctx context.Context, c *api.Client, r *reader, repository string) (*comparison, error) {
	held, err := r.readAll(ctx)
	if err != nil {
		return nil, err
	}
	known, err := c.Artifacts(ctx)
	if err != nil {
		return nil, err
	}
	found := &comparison{Repository: repository, InRegistry: len(held), Findings: []finding{}}
	byDigest := map[string]api.Artifact{}
	have := map[string]bool{}
	for _, a := range held {
		have[a.digest] = true
	}
	for _, k := range known {
		byDigest[k.Digest] = k
		if k.Repository != repository {
			continue
		}
		found.InCatalogue++
		if have[k.Digest] {
			continue
		}
		switch _, err := r.repo.Resolve(ctx, k.Digest); {
		case fault.Is(err, fault.NoArtifact) && k.State.Withdrawn(): // no node is sent there
		case fault.Is(err, fault.NoArtifact):
			found.Findings = append(found.Findings, finding{Digest: k.Digest, Difference: absent, Driver: k.Driver,
				Note: "publish it again, or yank it", forget: strings.HasPrefix(repository, "/") && k.State == api.Published})
		case err != nil:
			return nil, err
		default: // the artifact is there, without a tag
			a, err := r.readOne(ctx, k.Digest)
			if err != nil {
				return nil, err
			}
			held = append(held, a)
			found.InRegistry++
		}
	}
	found.held = held
	for _, a := range held {
		k, ok := byDigest[a.digest]
		if f, same := compareArtifact(a, k, ok, repository); !same {
			found.Findings = append(found.Findings, f)
		}
	}
	return found, nil
}

// compareArtifact compares an artifact of the registry with its record in the catalogue.
func compareArtifact(a artifact, k api.Artifact, known bool, repository string) (f finding, same bool) {
	f = finding{Digest: a.digest, Driver: a.identity.Driver}
	if a.err != nil {
		f.Difference, f.Note = unverified, a.err.Error()
		if known {
			f.Note = "the catalogue has it: " + f.Note
		}
		return f, false
	}
	f.add = &api.NewArtifact{Digest: a.digest, Repository: repository, Fingerprint: a.identity.Fingerprint,
		Driver: a.identity.Driver, Release: a.identity.Release}
	if !known {
		f.Difference, f.Kernels, f.Note = missing, a.kernels, "for "+kernelNames(a.kernels)
		return f, false
	}
	if notes := contradictions(a, k); len(notes) > 0 {
		f.Difference, f.Note, f.add = differs, strings.Join(notes, "; "), nil
		return f, false
	}
	if k.Repository != repository {
		f.Difference, f.Kernels, f.Note = differs, a.kernels, "the catalogue has it in the repository "+k.Repository
		return f, false
	}
	if f.Kernels = without(a.kernels, k.Kernels); len(f.Kernels) > 0 {
		f.Difference, f.Note = attested, "also fits "+kernelNames(f.Kernels)
		return f, false
	}
	return f, true
}

// contradictions returns a note for each fact in which the artifact and its record in the catalogue differ, except the
// repository.
func contradictions(a artifact, k api.Artifact) (notes []string) {
	if id := a.identity; k.Fingerprint != id.Fingerprint {
		notes = append(
			notes,
			fmt.Sprintf("its fingerprint is %s, the catalogue has %s", id.Fingerprint.Short(), k.Fingerprint.Short()),
		)
	}
	if k.Driver != a.identity.Driver {
		notes = append(notes, fmt.Sprintf("its driver is %s, the catalogue has %s", a.identity.Driver, k.Driver))
	}
	if k.Arch != a.identity.Arch {
		notes = append(notes, fmt.Sprintf("its architecture is %s, the catalogue has %s", a.identity.Arch, k.Arch))
	}
	if k.Release != "" && k.Release != a.identity.Release {
		notes = append(notes, fmt.Sprintf("its kernel release is %s, the catalogue has %s", a.identity.Release, k.Release))
	}
	if more := without(k.Kernels, a.kernels); len(more) > 0 {
		notes = append(notes, "it has no kernel match for "+kernelNames(more))
	}
	return notes
}

// without returns the kernels of the first list that the second lacks.
func without(all, others []target.Kernel) (rest []target.Kernel) {
	have := map[string]bool{}
	for _, k := range others {
		have[k.String()] = true
	}
	for _, k := range all {
		if !have[k.String()] {
			rest = append(rest, k)
		}
	}
	return rest
}

func kernelNames(kernels []target.Kernel) string {
	if len(kernels) > 1 {
		return kernels[0].String() + " and " + strconv.Itoa(len(kernels)-1) + " more"
	}
	return kernels[0].String()
}

// maxCall is the maximum number of kernels of an artifact in one call.
const maxCall = 1000

// apply adds the missing records to the catalogue, and removes those of absent artifacts. It continues after a refused
// artifact, and stops if the server does not respond.
func (c *comparison) apply(ctx context.Context, to *api.Client) error {
	for i := range c.Findings {
		f := &c.Findings[i]
		if f.forget {
			err := to.ForgetArtifact(ctx, f.Digest)
			if err != nil && !fault.Is(err, fault.Mismatch) && !fault.Is(err, fault.Forbidden) {
				return fmt.Errorf("forget the artifact %s: %w", f.Digest, err)
			}
			if f.Applied = err == nil; err != nil {
				f.Note, f.forget = "the server refuses to forget it: "+err.Error(), false
			}
		}
		if f.add == nil {
			continue
		}
		for from := 0; from < len(f.Kernels); from += maxCall {
			part := *f.add
			part.Kernels = f.Kernels[from:min(from+maxCall, len(f.Kernels))]
			stored, err := to.AddArtifact(ctx, part)
			if fault.Is(err, fault.Mismatch) || fault.Is(err, fault.Usage) {
				f.Note, f.add = "the server refuses it: "+err.Error(), nil
				break
			}
			if err != nil {
				return fmt.Errorf("record the artifact %s: %w", f.Digest, err)
			}
			if f.Difference == differs && stored.Repository != part.Repository {
				f.Note, f.add = "the server keeps the repository "+stored.Repository+
					", because its --public-repository is another", nil
				break
			}
			f.Applied = from+maxCall >= len(f.Kernels)
		}
	}
	return nil
}

// remainingError returns an error with a hint if differences remain.
func (c *comparison) remainingError() error {
	count := map[difference]int{}
	rest, applicable := 0, 0
	for _, f := range c.Findings {
		if !f.Applied {
			count[f.Difference]++
			rest++
			if f.add != nil || f.forget {
				applicable++
			}
		}
	}
	switch {
	case count[unverified] > 0:
		return fault.New(fault.Unverified, fmt.Sprintf("%d published artifacts are unverified", count[unverified]),
			"if you trust their publisher, give its public key with --public-key FILE; otherwise delete them from the registry")
	case rest > 0:
		hint := "for each artifact that differs or is absent: publish it again, or yank it: server yank DIGEST --reason WHY"
		if applicable > 0 {
			hint = "to record what is missing and to forget what is absent, run the same command with --apply"
		}
		if count[lost] == rest {
			hint = "for each artifact that only the bucket has, request a build: server request"
		}
		return fault.New(fault.Mismatch, fmt.Sprintf("repository %s and the catalogue differ in %d artifacts", c.Repository,
			rest), hint)
	}
	return nil
}

// printable replaces each character that is not printable by a ?. Text from a registry must not send control sequences
// to a terminal.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsGraphic(r) {
			return r
		}
		return '?'
	}, text)
}

func printComparison(w io.Writer, c *comparison) error {
	if _, err := fmt.Fprintf(w, "in the registry %d, in the catalogue %d artifacts\n", c.InRegistry,
		c.InCatalogue); err != nil {
		return err
	}
	if c.Bucket != "" {
		if _, err := fmt.Fprintf(w, "in the bucket %d tarballs\n", c.InBucket); err != nil {
			return err
		}
	}
	var rows [][]string
	for _, f := range c.Findings {
		state := string(f.Difference)
		if f.Applied {
			state = "recorded"
			if f.forget {
				state, f.Note = "forgotten", "its cells can be built again"
			}
		}
		driver := "-"
		if f.Driver.Version != "" {
			driver = f.Driver.String()
		}
		digest := "-"
		if f.Digest != "" {
			digest = strings.TrimPrefix(f.Digest, "sha256:")[:12]
		}
		rows = append(rows, []string{digest, state, driver, printable(f.Note)})
	}
	return printTable(w, []string{"DIGEST", "STATE", "DRIVER", "NOTE"}, rows, "no differences")
}
