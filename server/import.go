package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// importCommand returns the command that pushes a bundle to the server and records its drivers in the catalogue. It
// verifies everything, layers included, before it sends anything.
func importCommand() *ucli.Command {
	return &ucli.Command{
		Name: "import", Usage: "copy the drivers of an offline bundle to the registry and the catalogue",
		ArgsUsage: "FILE[+DELTA…]",
		Description: `FILE is a bundle of "builder bundle create", or any OCI image layout in a tar;
for an OCI image layout in a folder, write oci:FOLDER. The command verifies each
driver as a node does. It copies artifacts and attestations unchanged to the
server's registry, and records the drivers in the server's catalogue. If one
driver cannot be verified, or has a damaged layer, nothing is copied. Three
kinds of attachments are copied with a driver: deltas, attestations by the
signers that the flags name, and what these attestations refer to.

Example:
  server import drivers.tar --public-key farm.pub --token-file token
  server import one.tar+two.tar --public-key farm.pub --token-file token`,
		Flags: append(signerFlags(), writeFlags(
			cli.String("repository", "/prebake/driver", "`REPOSITORY` on the server to copy the drivers to"),
		)...),
		Action: runImport,
	}
}

func runImport(ctx context.Context, cmd *ucli.Command) error {
	if cmd.Args().Len() != 1 {
		return fault.New(fault.Usage, cmd.FullName()+" takes one argument, the bundle",
			"give the path of the bundle: "+cmd.FullName()+" FILE")
	}
	ref := cmd.Args().First()
	if !strings.HasPrefix(ref, "oci:") {
		ref = "oci-archive:" + ref
	}
	from, err := registry.Open(ref, registry.Options{})
	if err != nil {
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
	to, err := pushTo(cmd, c.Base(), name)
	if err != nil {
		return err
	}
	found := &comparison{Repository: name, Findings: []finding{}}
	r := &reader{repo: from, verifier: verifier, now: time.Now()}
	if found.held, err = drivers(ctx, r); err != nil {
		return fmt.Errorf("read %s: %w", ref, err)
	}
	goes := newImportSet(r)
	for _, a := range found.held {
		err := a.err
		if err == nil {
			err = goes.addDriver(ctx, a.digest)
		}
		if err != nil {
			return fmt.Errorf("import the artifact %s: nothing was copied to the server: %w", a.digest, err)
		}
		f, _ := compareArtifact(a, api.Artifact{}, false, name)
		found.Findings = append(found.Findings, f)
	}
	found.LeftOut = goes.leftOut
	if _, err := registry.CopyTagged(ctx, from, to, goes.isDriver, goes.isAttached); err != nil {
		return err
	}
	if err := found.apply(ctx, c); err != nil {
		return err
	}
	if err := cli.Print(cmd, found, func(w io.Writer) error { return printImport(w, found) }); err != nil {
		return err
	}
	return found.remainingError()
}

func isDriver(m *v1.Manifest) bool { return m.Annotations[bundle.AnnotationFormat] != "" }

// drivers returns the tagged artifacts that are drivers. If there is none, the error has kind NoArtifact.
func drivers(ctx context.Context, r *reader) (held []artifact, err error) {
	tags, err := r.repo.Tags(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, tag := range tags {
		if strings.ContainsAny(tag, "/:@") {
			continue // a tag with these characters is the name of a container image
		}
		d, err := r.repo.Resolve(ctx, tag)
		if err != nil {
			return nil, err
		}
		digest := d.Digest.String()
		if seen[digest] || !d.MediaType.IsImage() {
			continue
		}
		seen[digest] = true
		raw, err := r.repo.Manifest(ctx, digest)
		if err != nil {
			return nil, err
		}
		var m v1.Manifest
		if json.Unmarshal(raw, &m) != nil || !isDriver(&m) {
			continue
		}
		a, err := r.readOne(ctx, digest)
		if err != nil {
			return nil, err
		}
		held = append(held, a)
	}
	if len(held) == 0 {
		return nil, fault.New(fault.NoArtifact, "the bundle has no drivers",
			"list the content of the bundle: builder bundle show FILE")
	}
	return held, nil
}

// pushTo opens a repository on the server with the caller's token.
func pushTo(cmd *ucli.Command, base, name string) (*registry.Repository, error) {
	if !strings.HasPrefix(name, "/") {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("repository %q: want a repository of this server, such as /prebake/driver", name),
			"to use another registry, copy the bundle there with \"builder bundle push\", and then run: server reindex --apply")
	}
	token := cmd.String("token")
	if file := cmd.String("token-file"); token == "" && file != "" {
		var err error
		if token, err = readToken(file); err != nil {
			return nil, err
		}
	}
	scheme, host, _ := strings.Cut(base, "://")
	return registry.Open(
		host+name,
		registry.Options{Plain: scheme == "http", Password: token, UserAgent: "prebake-server/" + version},
	)
}

func printImport(w io.Writer, c *comparison) error {
	var rows [][]string
	for _, f := range c.Findings {
		state := "refused"
		if f.Applied {
			state = "imported"
		}
		rows = append(
			rows,
			[]string{strings.TrimPrefix(f.Digest, "sha256:")[:12], state, f.Driver.String(), printable(f.Note)},
		)
	}
	if err := printTable(w, []string{"DIGEST", "STATE", "DRIVER", "NOTE"}, rows, "nothing"); err != nil || c.LeftOut == 0 {
		return err
	}
	_, err := fmt.Fprintf(w, "left out %d attached manifests: no trusted statement refers to them\n", c.LeftOut)
	return err
}
