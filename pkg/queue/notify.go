package queue

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/prebake/prebake/pkg/fault"
)

// notifyTime is how long a notification may take. PostgreSQL sends it when the transaction is committed.
const notifyTime = 5 * time.Second

// HearOwn tests whether PostgreSQL's notifications arrive. It calls send with a new payload, and waits until conn,
// which must listen to the channel of send, gets the notification with this payload. HearOwn drops all other
// notifications.
//
// A pooler that gives each transaction another connection accepts LISTEN, but passes no notification on. Only such a
// test shows that. If the notification does not arrive within notifyTime, the error is of kind Usage.
func HearOwn(ctx context.Context, conn *pgx.Conn, send func(ctx context.Context, payload string) error) error {
	limited, cancel := context.WithTimeout(ctx, notifyTime)
	defer cancel()
	own := "test " + rand.Text()
	if err := send(limited, own); err != nil {
		return fmt.Errorf("notify PostgreSQL: %w", err)
	}
	for {
		note, err := conn.WaitForNotification(limited)
		switch {
		case err == nil && note.Payload == own:
			return nil
		case err == nil:
			continue
		case ctx.Err() == nil && limited.Err() != nil:
			return fault.New(
				fault.Usage,
				fmt.Sprintf("listen to PostgreSQL: the program's own notification did not come back within %s", notifyTime),
				"give --database and --queue the address of PostgreSQL itself, or of a pooler in session mode; PgBouncer in "+
					"transaction mode passes no notifications on",
			)
		}
		return fmt.Errorf("listen to PostgreSQL: %w", err)
	}
}

// checkNotifications logs a warning if the queue's database sends no notifications. The worker then only polls.
func (q *Queue) checkNotifications(ctx context.Context) {
	err := q.hearOwn(ctx)
	if fault.Is(err, fault.Usage) {
		q.log.WarnContext(ctx, "notifications of the queue not received", "err", err, "hint", fault.Hint(err), "poll",
			pollInterval)
	}
}

// hearOwn runs [HearOwn] on the queue's database, with a channel that nobody else uses.
func (q *Queue) hearOwn(ctx context.Context) error {
	conn, err := pgx.ConnectConfig(ctx, q.pg.Config().ConnConfig)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // the connection is not used again
	channel := "prebake_test_" + strings.ToLower(rand.Text())
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	return HearOwn(ctx, conn, func(ctx context.Context, payload string) error {
		_, err := q.pg.Exec(ctx, "SELECT pg_notify($1, $2)", channel, payload)
		return err
	})
}
