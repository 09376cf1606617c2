package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/prebake/prebake/pkg/fault"
)

// CopySQLite writes a copy of an SQLite file, of the catalogue or another, to a file
// that must not exist. The copy is as the database was at one moment: what others
// write meanwhile is in it whole or not at all, and nobody waits for the copy. It is
// on the disk when this returns.
func CopySQLite(ctx context.Context, from, to string) error {
	if err := copySQLite(ctx, from, to); err != nil {
		return fmt.Errorf("copy database %s: %w", from, err)
	}
	return nil
}

func copySQLite(ctx context.Context, from, to string) (err error) {
	// SQLite would make a database that is not there.
	if _, err := os.Stat(from); err != nil {
		return fault.Wrap(fault.NotFound, err, "name the server's data folder: --data FOLDER")
	}
	// The copy is private from its first byte: SQLite fills an empty file that is there.
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
	// SQLite reads the source in one transaction. With a write-ahead log, as all of ours
	// have, that blocks no writer.
	if _, err := db.ExecContext(ctx, `VACUUM INTO $1`, to); err != nil {
		return classify("vacuum", err)
	}
	return f.Sync()
}
