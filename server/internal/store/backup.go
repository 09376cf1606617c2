package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/prebake/prebake/pkg/fault"
)

// CopySQLite copies an SQLite database, the catalogue or another, to a new file. It refuses a file that exists. The
// copy has the state of one moment: another writer's transaction is in it as a whole or not at all. No writer waits
// for the copy. The copy is on the disk when CopySQLite returns.
func CopySQLite(ctx context.Context, from, to string) error {
	if err := copySQLite(ctx, from, to); err != nil {
		return fmt.Errorf("copy database %s: %w", from, err)
	}
	return nil
}

func copySQLite(ctx context.Context, from, to string) (err error) {
	// Without this check, SQLite would make a missing database.
	if _, err := os.Stat(from); err != nil {
		return fault.Wrap(fault.NotFound, err, "name the data folder of the server: --data FOLDER")
	}
	// The file is made first, so that the copy is private from its first byte. SQLite accepts an empty file as target.
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	db, err := sqlite(from, url.Values{"_pragma": {"busy_timeout(10000)"}}, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	// SQLite reads the source in one transaction. All our databases have a write-ahead log, so the transaction blocks no
	// writer.
	if _, err := db.ExecContext(ctx, `VACUUM INTO $1`, to); err != nil {
		return classify("vacuum", err)
	}
	return f.Sync()
}
