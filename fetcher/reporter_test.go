package main

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/pkg/api"
)

// TestReporterHoldsUpNothing checks a server that accepts no report. It must not delay the node, and may delay the end
// of the program only for leaveTime.
func TestReporterHoldsUpNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		begin, sent := time.Now(), 0
		slow := startReporter(slog.New(slog.DiscardHandler), func(ctx context.Context, _ api.NodeReport) error {
			sent++
			<-ctx.Done()
			return context.Cause(ctx)
		})
		for range 100 {
			slow.queue(api.NodeReport{})
		}
		if took := time.Since(begin); took != 0 {
			t.Errorf("queueing took %v; want no time", took)
		}
		slow.close()
		if took := time.Since(begin); took != leaveTime {
			t.Errorf("the end took %v; want %v", took, leaveTime)
		}
		<-slow.done // done is closed after all, because each report has a time limit
		if sent == 0 || sent > 9 {
			t.Errorf("%d reports were begun; want what the queue holds at most", sent)
		}
	})
}

func TestReporterSends(t *testing.T) {
	t.Parallel()
	var got []string
	fine := startReporter(slog.New(slog.DiscardHandler), func(_ context.Context, r api.NodeReport) error {
		got = append(got, r.Digest)
		return nil
	})
	fine.queue(api.NodeReport{Digest: "a"})
	fine.queue(api.NodeReport{Digest: "b"})
	fine.close()
	if len(got) != 2 || got[0] != "a" || got[1] != "b" {
		t.Errorf("sent %v; want a and b", got)
	}
}
