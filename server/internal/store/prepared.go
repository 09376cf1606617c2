package store

import (
	"context"
	"database/sql"
	"errors"
	"sync"
)

// preparedDB is an SQLite database that keeps its prepared statements, because preparing takes longer than most
// queries. There is a fixed number of statements. PostgreSQL's driver keeps its statements itself.
type preparedDB struct {
	*sql.DB
	mu    sync.Mutex
	stmts map[string]*sql.Stmt
	// txs has an entry for each open transaction. A transaction may have to prepare a statement on another connection,
	// so transactions leave one connection free.
	txs chan struct{}
}

func newPreparedDB(db *sql.DB, connections int) *preparedDB {
	return &preparedDB{DB: db, stmts: map[string]*sql.Stmt{}, txs: make(chan struct{}, connections-1)}
}

func (p *preparedDB) stmt(ctx context.Context, text string) (*sql.Stmt, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s, ok := p.stmts[text]; ok {
		return s, nil
	}
	s, err := p.DB.PrepareContext(context.WithoutCancel(ctx), text) // the statement outlives the first caller
	if err == nil {
		p.stmts[text] = s
	}
	return s, err
}

func (p *preparedDB) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	s, err := p.stmt(ctx, text)
	if err != nil {
		return nil, err
	}
	return s.QueryContext(ctx, args...)
}

func (p *preparedDB) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	s, err := p.stmt(ctx, text)
	if err != nil {
		return p.DB.QueryRowContext(ctx, text, args...) // fails the same way, and the row returns the error
	}
	return s.QueryRowContext(ctx, args...)
}

// preparedTx is a transaction that uses the statements of a [preparedDB].
type preparedTx struct {
	*sql.Tx
	p *preparedDB
}

func (t preparedTx) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	s, err := t.p.stmt(ctx, text)
	if err != nil {
		return nil, err
	}
	return t.Tx.StmtContext(ctx, s).QueryContext(ctx, args...)
}

func (t preparedTx) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	s, err := t.p.stmt(ctx, text)
	if err != nil {
		return t.Tx.QueryRowContext(ctx, text, args...) // fails the same way, and the row returns the error
	}
	return t.Tx.StmtContext(ctx, s).QueryRowContext(ctx, args...)
}

// Close closes the statements and the database.
func (p *preparedDB) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, s := range p.stmts {
		errs = append(errs, s.Close())
	}
	clear(p.stmts)
	return errors.Join(append(errs, p.DB.Close())...)
}
