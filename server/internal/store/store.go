// Package store keeps the catalogue in SQLite or PostgreSQL. It is the only package with SQL. Methods of [Store] read.
// Methods of [Tx] write in one transaction. The rules are in package catalogue.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the database/sql driver "pgx"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
	sqlitedriver "modernc.org/sqlite" // registers the database/sql driver "sqlite"
	sqlitelib "modernc.org/sqlite/lib"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is an open catalogue. The caller closes it.
type Store struct {
	db       *sql.DB // for writing
	readers  reader  // for reading; with PostgreSQL the same database
	postgres bool
	cache    *cache
	stop     func() // ends the listener; nil without one
	log      *slog.Logger
	// schema is the number of the newest migration that this program knows.
	schema int64
	counts counts
}

// reader is a database that is only read.
type reader interface {
	querier
	BeginTx(ctx context.Context, opts *sql.TxOptions) (*sql.Tx, error)
	Close() error
}

// readers is the number of connections that read from SQLite. They do not wait for a write.
const readers = 8

// Open opens the database sqlite:///abs/path or postgres://… and updates its tables.
func Open(ctx context.Context, rawURL string) (*Store, error) {
	return OpenLogged(ctx, rawURL, slog.New(slog.DiscardHandler))
}

// OpenLogged works as [Open] does. It also logs errors of the listener that receives the changes of other servers.
func OpenLogged(ctx context.Context, rawURL string, log *slog.Logger) (*Store, error) {
	s, err := open(rawURL)
	if err != nil {
		return nil, fmt.Errorf("open the catalogue: %w", err)
	}
	s.log = log
	if err := s.migrate(ctx); err != nil {
		if !fault.Is(err, fault.Usage) {
			err = fault.Wrap(fault.Transient, err, "check that the server can reach the database and may write to it")
		}
		return nil, errors.Join(fmt.Errorf("migrate catalogue: %w", err), s.Close())
	}
	if !s.postgres {
		s.cache.setListening(true) // no other process writes
		return s, nil
	}
	listening, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var done sync.WaitGroup
	done.Go(func() { s.listen(listening, rawURL) })
	s.stop = func() { cancel(); done.Wait() }
	return s, nil
}

func open(rawURL string) (*Store, error) {
	if file, ok := strings.CutPrefix(rawURL, "sqlite://"); ok {
		if !filepath.IsAbs(file) {
			return nil, fault.New(
				fault.Usage,
				fmt.Sprintf("the path %q of the SQLite file is not absolute", file),
				"write sqlite:///abs/path/catalogue.db",
			)
		}
		db, err := sqlite(file, url.Values{
			"_pragma": {"busy_timeout(10000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)"},
			"_txlock": {"immediate"},
		}, 1) // SQLite has one writer; with one connection, writers wait in order
		if err != nil {
			return nil, err
		}
		reading, err := sqlite(file, url.Values{"_pragma": {"busy_timeout(10000)", "query_only(1)"}}, readers)
		if err != nil {
			return nil, errors.Join(err, db.Close())
		}
		return &Store{db: db, readers: newPreparedDB(reading, readers), cache: newCache()}, nil
	}
	if strings.HasPrefix(rawURL, "postgres://") || strings.HasPrefix(rawURL, "postgresql://") {
		db, err := sql.Open("pgx", rawURL)
		if err != nil {
			return nil, err
		}
		db.SetMaxOpenConns(16)
		db.SetMaxIdleConns(16)
		db.SetConnMaxIdleTime(5 * time.Minute)
		return &Store{db: db, readers: db, postgres: true, cache: newCache()}, nil
	}
	return nil, fault.New(fault.Usage, "the URL is neither sqlite:///PATH nor postgres://…",
		"for SQLite, give --database sqlite:///abs/path/catalogue.db; for PostgreSQL, --database postgres://user@host/name")
}

// sqlite opens a pool of at most n connections to an SQLite file.
func sqlite(file string, query url.Values, n int) (*sql.DB, error) {
	dsn := url.URL{Scheme: "file", Path: file, RawQuery: query.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db, nil
}

// goMigrations are the parts of migrations in Go, by number of the migration.
var goMigrations = map[int64]func(context.Context, *sql.Tx) error{2: fillSortKeys, 13: chooseAllCounted}

// fillSortKeys sets the sort keys of rows that were stored before the column for sort keys was added.
func fillSortKeys(ctx context.Context, tx *sql.Tx) error {
	for _, column := range []struct{ table, version string }{{"kernels", "build_id"}, {"drivers", "version"}} {
		var versions []string
		err := query(ctx, tx, func(row func(...any) error) error {
			var v string
			err := row(&v)
			versions = append(versions, v)
			return err
		}, `SELECT DISTINCT `+column.version+` FROM `+column.table)
		if err != nil {
			return err
		}
		for _, v := range versions {
			_, err := tx.ExecContext(
				ctx,
				`UPDATE `+column.table+` SET sort_key = $2 WHERE `+column.version+` = $1`,
				v,
				target.SortKey(v),
			)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// migrate runs the embedded migrations that the database lacks. If a newer server has migrated the database, the error
// has kind Usage.
func (s *Store) migrate(ctx context.Context) error {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return err
	}
	id, sorted := "INTEGER PRIMARY KEY AUTOINCREMENT", "TEXT" // SQLite compares bytes by default
	dialect := goose.DialectSQLite3
	options := []goose.ProviderOption{goose.WithDisableGlobalRegistry(true)}
	if s.postgres {
		id, sorted, dialect = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", `TEXT COLLATE "C"`, goose.DialectPostgres
		locker, err := lock.NewPostgresSessionLocker()
		if err != nil {
			return err
		}
		options = append(options, goose.WithSessionLocker(locker))
	}
	var steps []*goose.Migration
	for _, name := range names {
		number, _, _ := strings.Cut(path.Base(name), "_")
		version, err := strconv.ParseInt(number, 10, 64)
		if err != nil {
			return fmt.Errorf("read the number of migration %s: %w", name, err)
		}
		s.schema = max(s.schema, version)
		text, err := migrations.ReadFile(name)
		if err != nil {
			return err
		}
		statements := strings.NewReplacer("{{id}}", id, "{{sorted}}", sorted).Replace(string(text))
		steps = append(steps, goose.NewGoMigration(version, &goose.GoFunc{
			RunTx: func(ctx context.Context, tx *sql.Tx) error {
				if _, err := tx.ExecContext(ctx, statements); err != nil || goMigrations[version] == nil {
					return err
				}
				return goMigrations[version](ctx, tx)
			},
		}, nil))
	}
	provider, err := goose.NewProvider(dialect, s.db, nil, append(options, goose.WithGoMigrations(steps...))...)
	if err != nil {
		return err
	}
	if _, err := provider.Up(ctx); err != nil {
		return err
	}
	is, err := schemaOf(ctx, s.db)
	if err == nil && is > s.schema {
		err = fault.New(fault.Usage, newerSchema(is, s.schema),
			"start the newer server, or restore the backup from before the upgrade, as docs/how-to/upgrade.md says")
	}
	return err
}

// schemaOf returns the number of the newest migration of a database.
func schemaOf(ctx context.Context, q querier) (is int64, err error) {
	err = q.QueryRowContext(ctx, `SELECT MAX(version_id) FROM goose_db_version`).Scan(&is)
	return is, err
}

func newerSchema(is, known int64) string {
	return fmt.Sprintf("a newer server has migrated the database to schema %d, and this server knows schema %d", is, known)
}

// Close closes the database.
func (s *Store) Close() error {
	if s.stop != nil {
		s.stop()
	}
	if s.postgres {
		return s.db.Close()
	}
	return errors.Join(s.readers.Close(), s.db.Close())
}

// Ping returns an error if the database does not answer. It does not wait for writers.
func (s *Store) Ping(ctx context.Context) error {
	var one int
	err := s.readers.QueryRowContext(ctx, `SELECT 1`).Scan(&one)
	return classify("reach catalogue", err)
}

// classify gives a database error a kind: DiskFull for a full disk, otherwise Transient. An error with a kind keeps it.
func classify(what string, err error) error {
	var classified *fault.Error
	if err == nil || errors.As(err, &classified) {
		return err
	}
	if code := (*sqlitedriver.Error)(nil); errors.As(err, &code) && code.Code()&0xff == sqlitelib.SQLITE_FULL {
		return fault.Wrap(fault.DiskFull, fmt.Errorf("%s: %w", what, err), "free space on the disk of the data folder")
	}
	return fault.Wrap(fault.Transient, fmt.Errorf("%s: %w", what, err), "")
}

// querier is a database or a transaction.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// query runs a SELECT and calls scan for each row.
func query(
	ctx context.Context,
	q querier,
	scan func(row func(...any) error) error,
	text string,
	args ...any,
) (err error) {
	rows, err := q.QueryContext(ctx, text, args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		if err := scan(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Tx is a transaction that writes. With PostgreSQL, its isolation level is READ COMMITTED, whatever the database's
// default is: each statement sees what others have committed before it. So others may change rows that this transaction
// has read, unless a method locks them. With SQLite, there is only one writer.
type Tx struct {
	*sql.Tx
	// Conn is the connection of the transaction.
	Conn     *sql.Conn
	postgres bool
	touched  map[string]bool // keys of what the transaction changes; see touch
}

// Write calls f in a transaction, and commits. If f returns an error, Write rolls back and returns the error.
func (s *Store) Write(ctx context.Context, f func(*Tx) error) (err error) {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return classify("write to catalogue", err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }() // returns it to the pool
	options := &sql.TxOptions{}
	if s.postgres {
		options.Isolation = sql.LevelReadCommitted // checkSchema, and reads after a lock, must see what others committed
	}
	tx, err := conn.BeginTx(ctx, options)
	if err != nil {
		return classify("write to catalogue", err)
	}
	// If f panics, roll back: conn.Close would wait for the open transaction for ever. After a commit, Rollback does
	// nothing.
	defer func() { _ = tx.Rollback() }()
	t := &Tx{Tx: tx, Conn: conn, postgres: s.postgres}
	err = f(t)
	notes := t.notes()
	if err == nil {
		err = t.notify(ctx, notes)
	}
	if err == nil {
		err = t.checkSchema(ctx, s.schema)
	}
	if err != nil {
		return classify("write to catalogue", errors.Join(err, tx.Rollback()))
	}
	err = tx.Commit()
	s.cache.forget(notes...) // after an error, too: the commit may have succeeded
	return classify("write to catalogue", err)
}

// checkSchema returns an error if a newer server has migrated the database since this server started, because this
// server does not know what else it must write. A migration waits for the transactions that write to its tables. So a
// transaction that checks this last is complete before the migration begins, or finds its result.
//
// With SQLite, no check is necessary: only one server at a time can use the database.
func (tx *Tx) checkSchema(ctx context.Context, known int64) error {
	if !tx.postgres {
		return nil
	}
	is, err := schemaOf(ctx, tx)
	if err == nil && is > known {
		err = fault.New(fault.Transient, newerSchema(is, known), "stop this server, and use the newer one")
	}
	return err
}

// snapshot calls f with a transaction that reads the state of one moment, whatever others write meanwhile.
func (s *Store) snapshot(ctx context.Context, f func(querier) error) error {
	options := &sql.TxOptions{ReadOnly: true}
	if s.postgres {
		options.Isolation = sql.LevelRepeatableRead // SQLite always has this isolation
	}
	prepared, ok := s.readers.(*preparedDB)
	if ok {
		select {
		case prepared.txs <- struct{}{}:
			defer func() { <-prepared.txs }()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	tx, err := s.readers.BeginTx(ctx, options)
	if err != nil {
		return err
	}
	var q querier = tx
	if ok {
		q = preparedTx{tx, prepared}
	}
	return errors.Join(f(q), tx.Rollback())
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func timeOf(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

func timePtr(us int64) *time.Time {
	if us == 0 {
		return nil
	}
	t := timeOf(us)
	return &t
}

func ptrMicros(t *time.Time) int64 {
	if t == nil {
		return 0
	}
	return micros(*t)
}
