// Package store keeps the catalogue in a database: SQLite in one file, or
// PostgreSQL. It is the only package with SQL. It refuses to decide anything:
// which transitions are allowed, what matches what, is package catalogue's.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the database/sql driver "pgx"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
	_ "modernc.org/sqlite" // registers the database/sql driver "sqlite"

	"github.com/prebake/prebake/pkg/fault"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is an open catalogue. Close it.
type Store struct {
	db       *sql.DB
	postgres bool
}

// Open opens sqlite:///abs/path or postgres://… and brings its tables up to date.
func Open(ctx context.Context, rawURL string) (*Store, error) {
	s, err := open(rawURL)
	if err != nil {
		return nil, fmt.Errorf("open catalogue: %w", err)
	}
	if err := s.migrate(ctx); err != nil {
		return nil, errors.Join(fault.Wrap(fault.Transient, fmt.Errorf("migrate catalogue: %w", err),
			"check that the database is reachable and writable, and not of a newer server"), s.db.Close())
	}
	return s, nil
}

func open(rawURL string) (*Store, error) {
	if file, ok := strings.CutPrefix(rawURL, "sqlite://"); ok {
		if !filepath.IsAbs(file) {
			return nil, fault.New(fault.Usage, fmt.Sprintf("sqlite path %q is not absolute", file), "write sqlite:///abs/path/catalogue.db")
		}
		dsn := url.URL{Scheme: "file", Path: file, RawQuery: url.Values{
			"_pragma": {"busy_timeout(10000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)"},
			"_txlock": {"immediate"},
		}.Encode()}
		db, err := sql.Open("sqlite", dsn.String())
		if err != nil {
			return nil, err
		}
		// SQLite has one writer; one connection makes waiting for it fair and
		// keeps "database is locked" out of the answers.
		db.SetMaxOpenConns(1)
		return &Store{db: db}, nil
	}
	if strings.HasPrefix(rawURL, "postgres://") || strings.HasPrefix(rawURL, "postgresql://") {
		db, err := sql.Open("pgx", rawURL)
		if err != nil {
			return nil, err
		}
		db.SetMaxOpenConns(16)
		db.SetConnMaxIdleTime(5 * time.Minute)
		return &Store{db: db, postgres: true}, nil
	}
	return nil, fault.New(fault.Usage, "the URL is neither sqlite:///PATH nor postgres://…",
		"use --database sqlite:///abs/path/catalogue.db or --database postgres://user@host/name")
}

// migrate runs the embedded migrations that the database lacks.
func (s *Store) migrate(ctx context.Context) error {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return err
	}
	id := "INTEGER PRIMARY KEY AUTOINCREMENT"
	dialect := goose.DialectSQLite3
	options := []goose.ProviderOption{goose.WithDisableGlobalRegistry(true)}
	if s.postgres {
		id, dialect = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", goose.DialectPostgres
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
			return fmt.Errorf("migration %s: %w", name, err)
		}
		text, err := migrations.ReadFile(name)
		if err != nil {
			return err
		}
		statements := strings.ReplaceAll(string(text), "{{id}}", id)
		steps = append(steps, goose.NewGoMigration(version, &goose.GoFunc{
			RunTx: func(ctx context.Context, tx *sql.Tx) error {
				_, err := tx.ExecContext(ctx, statements)
				return err
			},
		}, nil))
	}
	provider, err := goose.NewProvider(dialect, s.db, nil, append(options, goose.WithGoMigrations(steps...))...)
	if err != nil {
		return err
	}
	_, err = provider.Up(ctx)
	return err
}

// Close closes the database.
func (s *Store) Close() error { return s.db.Close() }

// Ping reports whether the database answers.
func (s *Store) Ping(ctx context.Context) error {
	if err := s.db.PingContext(ctx); err != nil {
		return fault.Wrap(fault.Transient, fmt.Errorf("reach catalogue: %w", err), "")
	}
	return nil
}

// trouble classifies a database error: the database may answer better later.
func trouble(what string, err error) error {
	if err == nil {
		return nil
	}
	return fault.Wrap(fault.Transient, fmt.Errorf("%s: %w", what, err), "")
}

// query runs a SELECT and hands each row to scan.
func (s *Store) query(ctx context.Context, scan func(row func(...any) error) error, text string, args ...any) (err error) {
	rows, err := s.db.QueryContext(ctx, text, args...)
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

// inTx runs f in a transaction.
func (s *Store) inTx(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
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
