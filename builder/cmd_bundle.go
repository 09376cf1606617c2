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
	"github.com/prebake/prebake/builder/internal/offline"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

func bundleCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "bundle",
		Usage: "pack drivers into one file for a site without a network, and read such a file",
		Commands: []*ucli.Command{
			bundleCreateCommand(), bundleShowCommand(), bundlePushCommand(), bundleExtractCommand(),
		},
	}
}

// registryFlags returns the flags --username and --password for a registry. The parameter is the flag that names this
// registry; the help texts contain it.
func registryFlags(flag string) []ucli.Flag {
	return []ucli.Flag{
		cli.String("username", "", "user `NAME` for the registry of "+flag+" (default: from Docker's configuration)"),
		cli.String("password", "", "`PASSWORD` or token for the registry of "+flag),
	}
}

// selectFlag returns a flag that selects drivers. If the user does not set the flag, all drivers are selected.
func selectFlag(name, usage string) ucli.Flag {
	f := cli.Strings(name, usage)
	f.DefaultText = "all"
	return f
}

// openBundle opens a bundle or a registry. The credentials for a registry come from Docker's configuration or from
// Google.
func openBundle(ref string) (*registry.Repository, error) {
	return registry.Open(ref, registry.Options{UserAgent: "prebake-builder/" + version, Keychain: login.Keychain()})
}

// openWithLogin opens a registry with the credentials in --username and --password.
func openWithLogin(cmd *ucli.Command, ref string) (*registry.Repository, error) {
	return registry.Open(ref, registry.Options{
		UserAgent: "prebake-builder/" + version, Keychain: login.Keychain(),
		Username: cmd.String("username"), Password: cmd.String("password"),
	})
}

// fileRef returns the registry reference of a bundle: oci-archive: and the file's name. For a bundle and its deltas,
// the name is a list of files with + between them. A name that begins with oci: or oci-archive: is returned unchanged.
func fileRef(name string) string {
	if strings.HasPrefix(name, "oci:") || strings.HasPrefix(name, "oci-archive:") {
		return name
	}
	return "oci-archive:" + name
}

func bundleCreateCommand() *ucli.Command {
	return &ucli.Command{
		Name: "create", Usage: "pack drivers and their attestations into an OCI image layout in a tar",
		ArgsUsage: "FILE",
		Description: `Packs each driver of --from that --kernel, --driver and --flavour select, with
everything that is attached to the driver except debug symbols. The same input
gives the same bytes. With --since, FILE is a delta: it leaves out what the
earlier bundle has. To read a delta, name both files with + between them.

Example:
  builder bundle create drivers.tar --from registry.example/prebake/driver \
    --kernel 17800.66.78/lakitu --driver 535.261.03 --public-key prebake.key.pub`,
		Flags: slices.Concat(
			cli.Group(groupFrom, cli.String("from", "", "repository `REF` with the drivers, as host/name or oci:FOLDER")),
			cli.Group(groupFrom, registryFlags("--from")...),
			cli.Group(groupWhat,
				selectFlag("kernel", "pack only drivers for this COS build and board, `BUILD_ID/BOARD`"),
				selectFlag("driver", "pack only drivers of this `VERSION`"),
				selectFlag("flavour", "pack only drivers of this `FLAVOUR`, open or proprietary"),
				cli.String("snapshot", "", "also pack the signed snapshot in `FOLDER`, unchanged"),
				cli.Strings("image",
					"also pack the container image `REF` (HOST/NAME:TAG or HOST/NAME@DIGEST) with all platforms"),
				cli.String("since", "",
					"make a delta: leave out what the earlier bundle `FILE` contains; for several bundles, write FILE+FILE"),
			),
			cli.Group(
				groupTrust,
				cli.Strings("public-key", "`FILE` with the public key of a trusted signer; the bundle gets this key, too"),
			),
			cli.Group(groupTrust, cli.TrustFlags()...),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: runBundleCreate,
	}
}

func runBundleCreate(ctx context.Context, cmd *ucli.Command) error {
	file, err := oneArg(cmd, "the file to make")
	if err != nil {
		return err
	}
	c, err := bundleConfig(cmd)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(file); err == nil {
		return fault.New(fault.Usage, file+" exists already", "give the name of a file that does not exist yet")
	}
	var report *offline.Report
	err = writeAtomically(file, func(w io.Writer) (err error) {
		report, err = offline.Write(ctx, w, c)
		return err
	})
	if err != nil {
		return err
	}
	return cli.Print(cmd, report, func(w io.Writer) error { return printBundle(w, file, report) })
}

// oneArg returns the only argument of a command. If the command got any other number of arguments, the error contains
// the given description of the wanted argument.
func oneArg(cmd *ucli.Command, what string) (string, error) {
	if cmd.Args().Len() != 1 {
		return "", fault.New(
			fault.Usage,
			fmt.Sprintf("%s takes one argument, %s; got %d", cmd.FullName(), what, cmd.Args().Len()),
			"see "+cmd.FullName()+" --help",
		)
	}
	return cmd.Args().First(), nil
}

// writeAtomically writes a file under a temporary name, and renames the file when it is complete.
func writeAtomically(file string, fill func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return fault.Wrap(fault.Usage, err, "give the name of a file in a folder that this user may write")
	}
	defer func() {
		if err != nil {
			err = errors.Join(fault.Disk(err, "free space on the disk of "+file), os.Remove(f.Name()))
		}
	}()
	err = fill(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

func bundleConfig(cmd *ucli.Command) (c offline.Config, err error) {
	c = offline.Config{
		Drivers:  cmd.StringSlice("driver"),
		Keys:     cmd.StringSlice("public-key"),
		Snapshot: cmd.String("snapshot"),
		Now:      time.Now(),
	}
	if err := requireFlags(cmd, "from"); err != nil {
		return c, err
	}
	if c.From, err = openWithLogin(cmd, cmd.String("from")); err != nil {
		return c, err
	}
	var errs []error
	for _, text := range cmd.StringSlice("kernel") {
		build, board, _ := strings.Cut(text, "/")
		k, err := target.ParseKernel(build, board)
		c.Kernels, errs = append(c.Kernels, k), append(errs, err)
	}
	for _, text := range c.Drivers {
		if !target.ValidVersion(text) {
			errs = append(errs, fmt.Errorf("driver %q: want a version, as in 535.261.03", text))
		}
	}
	for _, text := range cmd.StringSlice("flavour") {
		f, err := target.ParseFlavour(text)
		c.Flavours, errs = append(c.Flavours, f), append(errs, err)
	}
	if err := fault.Wrap(fault.Usage, errors.Join(errs...), "see "+cmd.FullName()+" --help"); err != nil {
		return c, err
	}
	for _, ref := range cmd.StringSlice("image") {
		where, name, err := splitReference(ref)
		if err != nil {
			return c, err
		}
		repo, err := openBundle(where)
		if err != nil {
			return c, err
		}
		c.Images = append(c.Images, offline.Image{Name: ref, Ref: name, Repo: repo})
	}
	if since := cmd.String("since"); since != "" {
		if c.Since, err = openBundle(fileRef(since)); err != nil {
			return c, err
		}
	}
	if c.Snapshot != "" {
		if info, err := os.Stat(c.Snapshot); err != nil || !info.IsDir() {
			return c, fault.New(fault.Usage, c.Snapshot+" is not a folder", "give the folder that builder snapshot made")
		}
	}
	c.Verifier, err = optionalVerifier(cmd)
	return c, err
}

// optionalVerifier returns a verifier for the signers in the flags, or nil if no flag names a signer.
func optionalVerifier(cmd *ucli.Command) (*trust.Verifier, error) {
	if len(cmd.StringSlice("public-key")) == 0 && cmd.String("trusted-root") == "" {
		return nil, nil
	}
	return newVerifier(cmd)
}

func printBundle(w io.Writer, file string, r *offline.Report) error {
	fmt.Fprintf(w, "wrote    %s, %s\nindex    %s\n", file, megabytes(r.Size), r.Index)
	for _, a := range r.Artifacts {
		fmt.Fprintf(w, "driver   %s for %s\n         %s, %s, with %d referrers\n",
			a.Driver, kernelNames(a.Kernels), a.Digest[:len("sha256:")+12], megabytes(a.Size), a.Attached)
	}
	for _, name := range r.Images {
		fmt.Fprintf(w, "image    %s\n", name)
	}
	if r.Snapshot > 0 {
		fmt.Fprintf(w, "snapshot %d files\n", r.Snapshot)
	}
	if r.Keys > 0 {
		fmt.Fprintf(w, "keys     %d; a receiver must compare them with keys from another source\n", r.Keys)
	}
	_, err := fmt.Fprintf(w, "holds    %d blobs, %s\n", r.Blobs, megabytes(r.Bytes))
	if err == nil && r.Base != "" {
		_, err = fmt.Fprintf(w, "delta of %s\nleft out %d blobs, %s: %.1f %% of all\n",
			r.Base, r.LeftOut, megabytes(r.LeftOutBytes), 100*float64(r.LeftOutBytes)/float64(max(1, r.Bytes+r.LeftOutBytes)))
	}
	return err
}

func kernelNames(kernels []target.Kernel) string {
	var all []string
	for _, k := range kernels {
		all = append(all, k.String())
	}
	return strings.Join(all, "\n         ")
}

func megabytes(n int64) string {
	if n < 100_000 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

func bundleShowCommand() *ucli.Command {
	return &ucli.Command{
		Name: "show", Usage: "list the contents of a bundle, and check every digest",
		ArgsUsage: "FILE[+DELTA…]",
		Description: `Example:
  builder bundle show drivers.tar+drivers-2.tar`,
		Flags: cli.Group(groupOutput, cli.OutputFlag()),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			file, err := oneArg(cmd, "the bundle")
			if err != nil {
				return err
			}
			repo, err := openBundle(fileRef(file))
			if err != nil {
				return err
			}
			listing, err := offline.Show(ctx, repo)
			if err != nil {
				return err
			}
			return cli.Print(cmd, listing, func(w io.Writer) error { return printListing(w, listing) })
		},
	}
}

func printListing(w io.Writer, l *offline.Listing) error {
	fmt.Fprintf(w, "index    %s\n", l.Index)
	if l.Base != "" {
		fmt.Fprintf(w, "delta of %s\n", l.Base)
	}
	for _, e := range l.Entries {
		fmt.Fprintf(
			w,
			"%-9s%s\n         %s, %s\n",
			e.Kind,
			strings.Join(e.Names, "\n         "),
			e.Digest[:len("sha256:")+12],
			megabytes(e.Size),
		)
	}
	_, err := fmt.Fprintf(w, "attached %d\nverified %d blobs, %s\n", l.Attached, l.Blobs, megabytes(l.Bytes))
	return err
}

func bundleExtractCommand() *ucli.Command {
	return &ucli.Command{
		Name: "extract", Usage: "write a bundle's snapshot or keys to a folder",
		ArgsUsage: "FILE[+DELTA…]",
		Description: `A bundle cannot prove who made it. Before you trust the keys in it, compare them
with keys that the publisher gave you in another way.

Example:
  builder bundle extract drivers.tar --snapshot /srv/snapshot`,
		Flags: cli.Group(groupTo,
			cli.String("snapshot", "", "write the snapshot to `FOLDER`, which must be new or empty"),
			cli.String("keys", "", "write the bundle's public keys to keys.pem in `FOLDER`, which must be new or empty"),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			file, err := oneArg(cmd, "the bundle")
			if err != nil {
				return err
			}
			repo, err := openBundle(fileRef(file))
			if err != nil {
				return err
			}
			if cmd.String("snapshot")+cmd.String("keys") == "" {
				return fault.New(fault.Usage, "extract: neither --snapshot nor --keys is given",
					"give --snapshot FOLDER, --keys FOLDER or both")
			}
			for _, what := range []struct{ tag, kind, dir string }{
				{offline.TagSnapshot, offline.TypeSnapshot, cmd.String("snapshot")},
				{offline.TagKeys, offline.TypeKeys, cmd.String("keys")},
			} {
				if what.dir == "" {
					continue
				}
				d, err := repo.Resolve(ctx, what.tag)
				if err != nil {
					return err
				}
				names, err := registry.SaveFiles(ctx, repo, d.Digest.String(), what.kind, what.dir)
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.Root().Writer, "wrote %d files of the %s to %s\n", len(names), what.tag, what.dir)
			}
			return nil
		},
	}
}
