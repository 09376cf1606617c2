package store_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/server/internal/store"
)

// deafPooler starts a proxy in front of a PostgreSQL server. The proxy accepts LISTEN but drops all notifications, as
// PgBouncer does in transaction mode. It returns the URL of the proxy.
func deafPooler(t *testing.T, raw string) string {
	t.Helper()
	config, err := pgx.ParseConfig(raw)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	serve := func(client net.Conn) error {
		defer client.Close()
		network, address := pgconn.NetworkAddress(config.Host, config.Port)
		server, err := net.Dial(network, address)
		if err != nil {
			return err
		}
		defer server.Close()
		running.Go(func() {
			_, _ = io.Copy(server, client) // fails when one side has closed the connection
			_ = server.Close()
		})
		return copyWithoutNotifications(client, server)
	}
	running.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return // the listener is closed
			}
			running.Go(func() {
				if err := serve(client); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
					t.Logf("proxy: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		if err := listener.Close(); err != nil {
			t.Error(err)
		}
		running.Wait()
	})
	u := url.URL{Scheme: "postgres", User: url.UserPassword(config.User, config.Password), Host: listener.Addr().String(),
		Path: "/" + config.Database, RawQuery: url.Values{"sslmode": {"disable"}}.Encode()}
	return u.String()
}

// copyWithoutNotifications copies the messages of a PostgreSQL server, except notifications. Each message begins with
// its type, and a length that includes its own four bytes
// (https://www.postgresql.org/docs/current/protocol-message-formats.html).
func copyWithoutNotifications(to io.Writer, from io.Reader) error {
	head := make([]byte, 5)
	for {
		if _, err := io.ReadFull(from, head); err != nil {
			return err
		}
		out := to
		if head[0] == 'A' { // NotificationResponse
			out = io.Discard
		}
		if _, err := out.Write(head); err != nil {
			return err
		}
		if _, err := io.CopyN(out, from, int64(binary.BigEndian.Uint32(head[1:]))-4); err != nil {
			return err
		}
	}
}

// warnings is a log handler. It sends the number of attributes of each warning to the channel.
type warnings chan int

func (w warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (w warnings) WithAttrs([]slog.Attr) slog.Handler           { return w }
func (w warnings) WithGroup(string) slog.Handler                { return w }
func (w warnings) Handle(_ context.Context, r slog.Record) error {
	w <- r.NumAttrs()
	return nil
}

// TestDeafPooler opens a catalogue through a pooler that drops notifications. The server must warn once, and must not
// use its cache, because it would not learn of changes.
func TestDeafPooler(t *testing.T) {
	t.Parallel()
	raw := installed.Postgres(t)
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	told := make(warnings, 10)
	deaf, err := store.OpenLogged(ctx, deafPooler(t, raw), slog.New(told))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := deaf.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
		if len(told) != 0 {
			t.Errorf("%d more warnings; want one", len(told))
		}
	})
	select {
	case <-told:
	case <-ctx.Done():
		t.Fatal("no warning about the pooler")
	}
	other := open(t, raw)
	id := fmt.Sprintf("%d.1.0", time.Now().Unix()%1000000*100+99) // no other test uses this BUILD_ID
	for _, want := range []string{"535.1.1", "535.2.2"} {
		k := api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "deaf"}, Default: want, SeenAt: noon}
		if err := other.Write(ctx, func(tx *store.Tx) error { return tx.PutKernel(ctx, k) }); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			cells, err := deaf.KernelCells(ctx, id, "deaf")
			if err != nil || cells == nil || cells.Kernel.Default != want {
				t.Fatalf("KernelCells() = %+v, %v; want the default %s", cells, err, want)
			}
		}
	}
}
