package store

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"

	"github.com/prebake/prebake/pkg/fault"
)

// CopySQLite copies an SQLite database to a new file, and calls fsync. The copy is a snapshot, and blocks no writer. If
// the file exists, CopySQLite returns an error.
func CopySQLite(ctx context.Context, from, to string) error {
	if err := copySQLite(ctx, from, to); err != nil {
		return fmt.Errorf("copy the database %s: %w", from, err)
	}
	return nil
}

func copySQLite(ctx context.Context, from, to string) (err error) {
	// If the database is missing, SQLite would make an empty one.
	if _, err := os.Stat(from); err != nil {
		return fault.Wrap(fault.NotFound, err,
			"give the same --data, --database and --queue as to server serve")
	}
	// SQLite accepts an empty file as target, so create it with a mode that lets only this user read it.
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
	// This transaction blocks no writer, because all our databases have a write-ahead log.
	if _, err := db.ExecContext(ctx, `VACUUM INTO $1`, to); err != nil {
		return classify("write the copy", err)
	}
	return f.Sync()
}
