package queue_test

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
)

// TestHearOwn sends a notice to a PostgreSQL channel and waits for it. In one row the notice is lost, as behind a
// connection pooler that does not support LISTEN.
func TestHearOwn(t *testing.T) {
	t.Parallel()
	raw := freshSchema(t)
	for _, row := range []struct {
		name      string
		swallowed bool
		want      fault.Kind // kind of the error; Internal means no error
	}{{"heard", false, fault.Internal}, {"swallowed", true, fault.Usage}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			conns := make([]*pgx.Conn, 2)
			for i := range conns {
				conn, err := pgx.Connect(ctx, raw)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := conn.Close(context.WithoutCancel(ctx)); err != nil {
						t.Error(err)
					}
				})
				conns[i] = conn
			}
			channel := "hear_" + row.name
			if _, err := conns[0].Exec(ctx, "LISTEN "+channel); err != nil {
				t.Fatal(err)
			}
			err := queue.HearOwn(ctx, conns[0], func(ctx context.Context, payload string) error {
				if row.swallowed {
					payload = "of another program"
				}
				_, err := conns[1].Exec(ctx, "SELECT pg_notify($1, $2)", channel, payload)
				return err
			})
			if (err == nil) == row.swallowed || fault.Of(err) != row.want {
				t.Errorf("HearOwn() = %v; want kind %s", err, row.want)
			}
			if row.swallowed && !strings.Contains(fault.Hint(err), "--queue") {
				t.Errorf("the hint is %q; want the flag to change", fault.Hint(err))
			}
		})
	}
}
