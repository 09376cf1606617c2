package queue

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver"
	"github.com/riverqueue/river/rivertype"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// Within writes to the queue inside a transaction of the caller. The writes take effect when the transaction is
// committed.
type Within struct {
	q    *Queue
	conn *sql.Conn
	tx   *sql.Tx
}

// Within returns the queue for writes in a transaction on a connection. Connection and transaction must belong to the
// queue's own database. For PostgreSQL, they must come from the database/sql driver "pgx".
func (q *Queue) Within(conn *sql.Conn, tx *sql.Tx) Within { return Within{q, conn, tx} }

// Insert works as [Queue.Insert] does.
func (w Within) Insert(ctx context.Context, job api.BuildJob, priority int) error {
	return w.do(func(db database) error { return db.insertBuild(ctx, job, priority) })
}

// SetPriority works as [Queue.SetPriority] does.
func (w Within) SetPriority(ctx context.Context, build int64, priority int) error {
	return w.do(func(db database) error { return db.raise(ctx, build, priority) })
}

// Cancel works as [Queue.Cancel] does.
func (w Within) Cancel(ctx context.Context, build int64) error {
	return w.do(func(db database) error { return db.cancel(ctx, build) })
}

// do passes River's functions for the caller's transaction to the callback.
func (w Within) do(f func(database) error) error {
	if c, ok := w.q.insert.(*river.Client[*sql.Tx]); ok {
		return f(inTx(c, w.tx))
	}
	c, ok := w.q.insert.(*river.Client[pgx.Tx])
	if !ok {
		return fault.New(fault.Internal, "write to queue: the queue's client is for an unknown database", "")
	}
	return w.conn.Raw(func(driver any) error {
		under, ok := driver.(*stdlib.Conn)
		if !ok {
			return fault.New(fault.Internal,
				fmt.Sprintf("write to queue: the connection is a %T; want a connection of pgx", driver), "")
		}
		// Outside of a transaction, each statement would be committed alone.
		if status := under.Conn().PgConn().TxStatus(); status != 'T' {
			return fault.New(fault.Internal,
				fmt.Sprintf("write to queue: the connection is in no open transaction (status %q)", status), "")
		}
		return f(inTx[pgx.Tx](c, borrowedConn{under.Conn()}))
	})
}

// database has River's functions, for the database itself or for one transaction.
type database struct {
	exec   riverdriver.Executor
	insert func(context.Context, river.JobArgs, *river.InsertOpts) (*rivertype.JobInsertResult, error)
	remove func(ctx context.Context, job int64) (*rivertype.JobRow, error)
	pg     bool
}

// outsideTx returns River's functions outside of any transaction.
func (q *Queue) outsideTx() database {
	return database{q.exec, q.insert.Insert, q.insert.JobCancel, q.pg != nil}
}

func inTx[T any](c *river.Client[T], tx T) database {
	_, pg := any(tx).(pgx.Tx)
	return database{
		exec: c.Driver().UnwrapExecutor(tx),
		insert: func(ctx context.Context, args river.JobArgs, opts *river.InsertOpts) (*rivertype.JobInsertResult, error) {
			return c.InsertTx(ctx, tx, args, opts)
		},
		remove: func(ctx context.Context, job int64) (*rivertype.JobRow, error) { return c.JobCancelTx(ctx, tx, job) },
		pg:     pg,
	}
}

// borrowedConn is a connection with a transaction of database/sql. River may use the transaction, but must not end it.
type borrowedConn struct{ *connection }

// connection is another name of pgx.Conn. An embedded field Conn would hide the method Conn of borrowedConn.
type connection = pgx.Conn

var errNotOwner = errors.New("begin or end a transaction inside the queue: only the caller of the queue may do this")

func (j borrowedConn) Begin(context.Context) (pgx.Tx, error) { return nil, errNotOwner }
func (j borrowedConn) Commit(context.Context) error          { return errNotOwner }
func (j borrowedConn) Rollback(context.Context) error        { return errNotOwner }
func (j borrowedConn) LargeObjects() pgx.LargeObjects        { return pgx.LargeObjects{} }

// Conn returns the connection, which tells River how it sends a query's parameters.
func (j borrowedConn) Conn() *pgx.Conn { return j.connection }
