package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/snapshot/maker"
)

func snapshotCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "snapshot",
		Usage: "sign a list of published, yanked and quarantined artifacts, for nodes without a server",
		Description: `The list is a folder of files in the format of TUF (The Update Framework). Any
web server can serve it. Example:
  builder snapshot keys keys
  builder snapshot root --to list --keys keys --threshold 2
  builder snapshot make --to list --keys keys --server https://prebake.example
  builder snapshot refresh --to list --keys keys`,
		Commands: []*ucli.Command{
			snapshotKeysCommand(),
			snapshotRootCommand(),
			snapshotMakeCommand(),
			snapshotRefreshCommand(),
		},
	}
}

// snapshotRoles are the roles of a snapshot that have a key of their own, in addition to the root.
var snapshotRoles = []string{"targets", "snapshot", "timestamp"}

// toFlag returns the flag for the folder of the snapshot.
func toFlag() ucli.Flag { return cli.String("to", "", "`FOLDER` of the snapshot") }

// keyFlags returns the flag --keys, and for each given role the flag for the key of this role.
func keyFlags(roles ...string) []ucli.Flag {
	flags := []ucli.Flag{
		cli.String("keys", "", "`FOLDER` that \"builder snapshot keys\" made; used for each key that no other flag gives"),
	}
	for _, role := range roles {
		flags = append(flags, cli.String(role+"-key", "", "`KEY` for the \""+role+"\" role: a file or a KMS URI"))
	}
	return flags
}

// keyRef returns the reference of a role's key: the value of the role's flag, or the key's file in the folder of
// --keys.
func keyRef(cmd *ucli.Command, role string) (string, error) {
	if ref := cmd.String(role + "-key"); ref != "" {
		return ref, nil
	}
	if dir := cmd.String("keys"); dir != "" {
		path := filepath.Join(dir, role+".key")
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) && cmd.Name == "root" {
			// The root metadata lists public keys only, so a role's private key is not necessary.
			return path + ".pub", nil
		}
		return path, nil
	}
	return "", fault.New(fault.Usage, "no key is given for the role "+role, "add --keys FOLDER, or --"+role+"-key KEY")
}

// keyRefs returns the reference of each role's key, by role. It loads no key, so a missing flag is reported before any
// key is used.
func keyRefs(cmd *ucli.Command, roles ...string) (map[string]string, error) {
	refs := map[string]string{}
	for _, role := range roles {
		var err error
		if refs[role], err = keyRef(cmd, role); err != nil {
			return nil, err
		}
	}
	return refs, nil
}

func snapshotKeysCommand() *ucli.Command {
	return &ucli.Command{
		Name: "keys", Usage: "make keys that sign snapshots, and write them to a folder", ArgsUsage: "FOLDER",
		Flags: []ucli.Flag{cli.Int("root-keys", 3, "`COUNT` of root keys to make")},
		Action: func(_ context.Context, cmd *ucli.Command) error {
			dir, count := cmd.Args().First(), cmd.Int("root-keys")
			if dir == "" || cmd.Args().Len() != 1 || count < 1 || count > 9 {
				return fault.New(fault.Usage, "make keys: want one folder, and 1 to 9 root keys",
					"give one folder and at most 9 root keys: builder snapshot keys --root-keys 3 FOLDER")
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return fault.Wrap(fault.Usage, fmt.Errorf("make the folder for the keys: %w", err), "")
			}
			names := slices.Clone(snapshotRoles)
			for i := range count {
				names = append(names, fmt.Sprintf("root-%d", i+1))
			}
			for _, name := range names {
				path := filepath.Join(dir, name+".key")
				if err := sign.GenerateKey(path); err != nil {
					return err
				}
				if _, err := fmt.Fprintln(cmd.Root().Writer, path); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func snapshotRootCommand() *ucli.Command {
	return &ucli.Command{
		Name: "root", Usage: "write the next root, which lists the keys that may sign",
		Description: `Give nodes the first root, or any later one. The command needs as many private
root keys as --threshold says; for the remaining root keys, the public key is
enough. A later root must also be signed by keys of the previous root, by as
many as the threshold of the previous root says.`,
		Flags: append(cli.Group(groupTrust, append(keyFlags(snapshotRoles...),
			cli.Strings("root-key",
				"`KEY` of the new root: private key file, KMS URI, or public key file (which does not sign)"),
			cli.Strings("former-key",
				"`KEY` that the previous root lists and the new root does not; this key also signs the new root"),
			cli.Int("threshold", 2, "`COUNT` of root keys that must sign a root"),
			lifetimeFlag("life", 365*24*time.Hour, "`TIME` until the root expires"),
		)...), cli.Group(groupTo, toFlag())...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := requireFlags(cmd, "to"); err != nil {
				return err
			}
			ofRole, err := keyRefs(cmd, snapshotRoles...)
			if err != nil {
				return err
			}
			next := maker.Root{Threshold: cmd.Int("threshold"), Expires: time.Now().Add(cmd.Duration("life"))}
			refs := cmd.StringSlice("root-key")
			if len(refs) == 0 && cmd.String("keys") != "" {
				if refs, err = rootKeys(cmd.String("keys")); err != nil {
					return err
				}
			}
			for _, ref := range refs {
				pub, by, err := sign.Metadata(ctx, ref)
				if err != nil {
					return err
				}
				if next.Keys = append(next.Keys, pub); by != nil {
					next.Signers = append(next.Signers, by)
				}
			}
			for _, ref := range cmd.StringSlice("former-key") {
				_, by, err := sign.Metadata(ctx, ref)
				if err != nil {
					return err
				}
				if by != nil {
					next.Signers = append(next.Signers, by)
				}
			}
			for i, role := range snapshotRoles {
				pub, _, err := sign.Metadata(ctx, ofRole[role])
				if err != nil {
					return err
				}
				switch i {
				case 0:
					next.Targets = pub
				case 1:
					next.Snapshot = pub
				case 2:
					next.Timestamp = pub
				}
			}
			return withSnapshot(cmd, func(r *maker.Repository) error {
				name, err := r.WriteRoot(next)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(cmd.Root().Writer, name)
				return err
			})
		},
	}
}

// rootKeys returns the files of the root keys in a folder. If a private key is missing, it returns the public key's
// file.
func rootKeys(dir string) ([]string, error) {
	var refs []string
	for i := 1; ; i++ {
		path := filepath.Join(dir, fmt.Sprintf("root-%d.key", i))
		for _, path := range []string{path, path + ".pub"} {
			if _, err := os.Stat(path); err == nil {
				refs = append(refs, path)
				break
			}
		}
		if len(refs) < i {
			break
		}
	}
	if len(refs) == 0 {
		return nil, fault.New(fault.Usage, "find root keys: neither root-1.key nor root-1.key.pub is in "+dir,
			"make keys with: builder snapshot keys "+dir)
	}
	return refs, nil
}

// withSnapshot opens the folder of the snapshot, passes it to the callback, and closes it afterwards.
func withSnapshot(cmd *ucli.Command, do func(*maker.Repository) error) error {
	r, err := maker.Open(cmd.String("to"), time.Now)
	if err != nil {
		return err
	}
	return errors.Join(do(r), r.Close())
}

// timestampLifetime returns the flag that sets how long a timestamp is valid. An attacker on the network can hide a
// newer list from a node for at most this time.
func timestampLifetime() ucli.Flag {
	return lifetimeFlag("life", 7*24*time.Hour, "`TIME` until the timestamp expires and nodes need a newer one")
}

// lifetimeFlag returns a flag that sets how long a file of the snapshot is valid.
func lifetimeFlag(name string, value time.Duration, usage string) ucli.Flag {
	f := cli.Duration(name, value, usage)
	f.Validator = func(d time.Duration) error {
		if d < time.Minute {
			return fmt.Errorf("--%s %v: want a duration of a minute or more", name, d)
		}
		return nil
	}
	return f
}

func snapshotMakeCommand() *ucli.Command {
	return &ucli.Command{
		Name: "make", Usage: "ask a server for its artifacts, and write the signed list of them",
		Flags: slices.Concat(
			cli.Group(groupFrom, cli.String("server", "", "`URL` of the server"),
				cli.Bool("allow-empty", "write the list even if the server has no published artifact")),
			cli.Group(groupTrust, append(keyFlags(snapshotRoles...), timestampLifetime(),
				lifetimeFlag("list-life", 90*24*time.Hour, "`TIME` until the list of artifacts expires"),
				cli.Int("least-version", 0, "lowest version `NUMBER` for the new list; needed if the folder of --to was lost"))...),
			cli.Group(groupTo, toFlag()),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := errors.Join(requireFlags(cmd, "to"), requireFlags(cmd, "server")); err != nil {
				return err
			}
			ofRole, err := keyRefs(cmd, snapshotRoles...)
			if err != nil {
				return err
			}
			var by maker.Signers
			for role, to := range map[string]*maker.Signer{"targets": &by.Targets, "snapshot": &by.Snapshot,
				"timestamp": &by.Timestamp} {
				if *to, err = snapshotSigner(ctx, role, ofRole[role]); err != nil {
					return err
				}
			}
			return withSnapshot(cmd, func(r *maker.Repository) error {
				now := time.Now()
				list, err := listOf(ctx, api.NewClient(cmd.String("server"), "", nil), now)
				if err != nil {
					return err
				}
				usable := func(a snapshot.Artifact) bool { return a.State == snapshot.Published }
				if !cmd.Bool("allow-empty") && !slices.ContainsFunc(list.Artifacts, usable) {
					return fault.New(
						fault.NoArtifact,
						"the server has no published artifact: nodes would install nothing",
						"check --server; to sign an empty snapshot, add --allow-empty",
					)
				}
				until := maker.Until{
					Targets:   now.Add(cmd.Duration("list-life")),
					Snapshot:  now.Add(cmd.Duration("list-life")),
					Timestamp: now.Add(cmd.Duration("life")),
				}
				s, err := r.Publish(list, by, until, int64(cmd.Int("least-version")))
				if err != nil {
					return err
				}
				return printSnapshot(cmd, s)
			})
		},
	}
}

func snapshotSigner(ctx context.Context, role, ref string) (maker.Signer, error) {
	_, by, err := sign.Metadata(ctx, ref)
	if err == nil && by == nil {
		err = fault.New(fault.Usage, ref+" is a public key, and cannot sign", "give the private key: --"+role+"-key KEY")
	}
	return by, err
}

// listOf returns a catalogue of all artifacts of a server. An artifact that changes while the server lists them can
// appear twice. Then the entry that says yanked or quarantined is used.
func listOf(ctx context.Context, server *api.Client, now time.Time) (snapshot.Catalogue, error) {
	c := snapshot.Catalogue{Schema: snapshot.Schema, MadeAt: now.UTC().Truncate(time.Second)}
	all, err := server.Artifacts(ctx)
	if err != nil {
		return c, err
	}
	at := map[string]int{}
	for _, a := range all {
		entry := snapshot.Artifact{
			Digest:      a.Digest,
			State:       snapshot.State(a.State),
			Reason:      a.Reason,
			Replacement: a.Replacement,
			Driver:      a.Driver,
			Fingerprint: a.Fingerprint,
		}
		for _, k := range a.Kernels {
			entry.Kernels = append(entry.Kernels, snapshot.Kernel{BuildID: k.BuildID, Board: k.Board})
		}
		i, twice := at[a.Digest]
		switch {
		case !twice:
			at[a.Digest] = len(c.Artifacts)
			c.Artifacts = append(c.Artifacts, entry)
		case entry.State != snapshot.Published:
			c.Artifacts[i] = entry
		}
	}
	return c, nil
}

func snapshotRefreshCommand() *ucli.Command {
	return &ucli.Command{
		Name: "refresh", Usage: "sign a new timestamp for the newest list, before the old timestamp expires",
		Flags: slices.Concat(
			cli.Group(groupTrust, append(keyFlags("timestamp"), timestampLifetime())...),
			cli.Group(groupTo, toFlag()),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if err := requireFlags(cmd, "to"); err != nil {
				return err
			}
			ref, err := keyRef(cmd, "timestamp")
			if err != nil {
				return err
			}
			by, err := snapshotSigner(ctx, "timestamp", ref)
			if err != nil {
				return err
			}
			return withSnapshot(cmd, func(r *maker.Repository) error {
				s, err := r.Refresh(by, time.Now().Add(cmd.Duration("life")))
				if err != nil {
					return err
				}
				return printSnapshot(cmd, s)
			})
		},
	}
}

// printSnapshot prints a summary of the published snapshot.
func printSnapshot(cmd *ucli.Command, s *snapshot.Snapshot) error {
	count := map[snapshot.State]int{}
	for _, a := range s.Artifacts {
		count[a.State]++
	}
	said := struct {
		Version     int64     `json:"version"`
		Refreshed   int64     `json:"refreshed"`
		MadeAt      time.Time `json:"madeAt"`
		Expires     time.Time `json:"expires"`
		Published   int       `json:"published"`
		Yanked      int       `json:"yanked"`
		Quarantined int       `json:"quarantined"`
	}{s.Version, s.Refreshed, s.MadeAt, s.Expires, count[snapshot.Published], count[snapshot.Yanked],
		count[snapshot.Quarantined]}
	return cli.Print(cmd, said, func(w io.Writer) error {
		_, err := fmt.Fprintf(
			w,
			"list      %d, made on %s\nexpires   %s\npublished %d\nyanked    %d\nin quarantine %d\n",
			said.Version,
			said.MadeAt.Format(time.RFC3339),
			said.Expires.Format(time.RFC3339),
			said.Published,
			said.Yanked,
			said.Quarantined,
		)
		return err
	})
}
