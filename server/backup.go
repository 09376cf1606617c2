package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/store"
)

// backupResult is what the command prints.
type backupResult struct {
	Folder string   `json:"folder"`
	Files  []string `json:"files"`
	// Dump has the databases in PostgreSQL, which the command does not copy.
	Dump []dump `json:"dump,omitempty"`
	// Left has the paths in the data folder that the operator still has to copy, in this order.
	Left []string `json:"left"`
}

// dump is a database in PostgreSQL that the operator has to dump.
type dump struct {
	Database string `json:"database"` // queue or catalogue
	When     string `json:"when"`     // before or after this command
}

func backupCommand() *ucli.Command {
	return &ucli.Command{
		Name: "backup", Usage: "copy the databases and the first token while the server runs", ArgsUsage: "FOLDER",
		Description: `FOLDER must not exist. The command creates FOLDER complete or not at all. Only
this user can read FOLDER, because it has hashed tokens and the first token.

Copy the registry afterwards: first DATA/registry/repos, then
DATA/registry/blobs, then DATA/registry/damaged. DATA is the folder of --data.
Build logs are in DATA/logs.
To restore, stop the server, put an empty folder in place of DATA, copy all
files back, start the server, and run server reindex.

The command copies SQLite files. If only the queue is in PostgreSQL, dump it
before this command; if only the catalogue is, dump it after this command.
If both are, this command refuses: dump the two, and copy the token.
Use pg_dump --format=custom and pg_restore.

Example:
  server backup --data /var/lib/prebake /backup/$(date +%F)`,
		Flags: append(cli.Group(cli.From,
			defaultsTo(cli.String("data", "", "`FOLDER` with all data of the server"), "as for server serve"),
			defaultsTo(cli.String("database", "", "`URL` of the catalogue's database"), "catalogue.db in --data"),
			defaultsTo(cli.String("queue", "", "`URL` of the build queue's database"), "queue.db in --data"),
			defaultsTo(cli.String("token-file", "", "`FILE` with the first token"), "token in --data"),
		), cli.Group(groupOutput, cli.OutputFlag())...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			folder, err := oneArg(cmd, "FOLDER", "give the path of a folder that does not exist yet")
			if err != nil {
				return err
			}
			s := settings{
				Data:      cmd.String("data"),
				Database:  cmd.String("database"),
				Queue:     cmd.String("queue"),
				TokenFile: cmd.String("token-file"),
			}
			if err := s.dataPaths(); err != nil {
				return err
			}
			done, err := backup(ctx, s, folder)
			if err != nil {
				return fmt.Errorf("back up to %s: %w", folder, err)
			}
			return cli.Print(cmd, done, func(w io.Writer) error { return printCopied(w, done) })
		},
	}
}

// backup copies the queue, then the catalogue. The operator copies the registry last. A database in PostgreSQL is left
// to the operator. Do not change this order:
//
//   - The queue before the catalogue. A queued build without a job is queued again by the sweep. In the other
//     order, the queue would have jobs of builds that the catalogue lacks. The sweep would remove those jobs, and
//     the builds would be lost.
//   - The catalogue before the registry. Builders push an artifact before they report it, so the later copy of the
//     registry has every artifact of the catalogue. The command reindex finds the artifacts that only the registry has.
//
// If an artifact is deleted between the last two copies, the command reindex reports it as absent.
func backup(ctx context.Context, s settings, folder string) (done backupResult, err error) {
	folder, err = filepath.Abs(folder)
	if err != nil {
		return done, err
	}
	if _, err := os.Lstat(folder); !errors.Is(err, fs.ErrNotExist) {
		return done, fault.New(fault.Usage, "the folder exists already",
			"give the path of a folder that does not exist yet")
	}
	type database struct{ url, flag, what, name string }
	databases := []database{
		{s.Queue, "queue", "queue", "queue.db"}, {s.Database, "database", "catalogue", "catalogue.db"},
	}
	if s.Queue == s.Database {
		databases = databases[1:]
	}
	done = backupResult{Folder: folder}
	var files []database
	for _, d := range databases {
		switch {
		case strings.HasPrefix(d.url, "sqlite://"):
			files = append(files, d)
		case !strings.HasPrefix(d.url, "postgres://") && !strings.HasPrefix(d.url, "postgresql://"):
			return done, fault.New(fault.Usage, "--"+d.flag+" is neither sqlite:///PATH nor postgres://…",
				"give --"+d.flag+" the same value as server serve")
		case len(files) > 0:
			done.Dump = append(done.Dump, dump{d.what, "after"})
		default:
			done.Dump = append(done.Dump, dump{d.what, "before"})
		}
	}
	if len(files) == 0 {
		return done, fault.New(
			fault.Usage,
			"neither catalogue nor queue is an SQLite file",
			"back up a PostgreSQL database with its own program: pg_dump --format=custom",
		)
	}
	// The backup gets its final name only when it is complete.
	part, err := os.MkdirTemp(filepath.Dir(folder), "."+filepath.Base(folder)+".part-") // mode 0700
	if err != nil {
		return done, fault.Wrap(fault.Usage, err, "choose a path whose parent folder this user may write to")
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(part))
		}
	}()
	for _, d := range files {
		if err := store.CopySQLite(ctx, strings.TrimPrefix(d.url, "sqlite://"), filepath.Join(part, d.name)); err != nil {
			return done, err
		}
		done.Files = append(done.Files, d.name)
	}
	switch copied, err := copyToken(s, filepath.Join(part, "token")); {
	case err != nil:
		return done, err
	case copied:
		done.Files = append(done.Files, "token")
	}
	if err := os.Rename(part, folder); err != nil {
		return done, err
	}
	for _, name := range []string{"registry/repos", "registry/blobs", "registry/damaged", "logs"} {
		done.Left = append(done.Left, filepath.Join(s.Data, name))
	}
	return done, syncFolder(filepath.Dir(folder))
}

// copyToken copies the file with the first token, and reports whether there is one. There is none if the token comes
// from --token or from a file outside the data folder.
func copyToken(s settings, to string) (bool, error) {
	from := s.TokenFile
	if from == "" {
		from = filepath.Join(s.Data, "token")
		if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
	}
	token, err := readToken(from)
	if err != nil {
		return false, err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return false, err
	}
	_, err = f.WriteString(token + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return false, err
	}
	return true, syncFolder(filepath.Dir(to))
}

// syncFolder calls fsync on a folder, so that the names of its files survive a crash.
func syncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func printCopied(w io.Writer, c backupResult) error {
	text := fmt.Sprintf("copied to %s: %s\n", c.Folder, strings.Join(c.Files, ", "))
	for _, d := range c.Dump {
		text += "not copied: the " + d.Database + ", which is in PostgreSQL. "
		if d.When == "before" {
			text += "Use the dump that you made before this command.\n"
		} else {
			text += "Dump it now, before you copy anything else.\n"
		}
	}
	_, err := fmt.Fprintf(w, "%snow copy, in this order:\n  %s\n", text, strings.Join(c.Left, "\n  "))
	return err
}
