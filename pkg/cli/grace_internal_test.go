package cli

import (
	"context"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestGracePeriod checks that work may continue during the grace period, and that it ends afterwards.
func TestGracePeriod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		hard, stop := grace(ctx, time.Minute, nil)
		defer stop()
		cancel()
		time.Sleep(59 * time.Second)
		if hard.Err() != nil {
			t.Error("work was cancelled within its grace period")
		}
		time.Sleep(2 * time.Second)
		if hard.Err() == nil {
			t.Error("work goes on after its grace period")
		}
	})
}

// TestGraceSignals checks that work continues after the first stop signal, and ends at the second.
func TestGraceSignals(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		signals := make(chan os.Signal)
		hard, stop := grace(ctx, time.Hour, signals)
		defer stop()
		cancel()
		signals <- syscall.SIGTERM
		synctest.Wait()
		if hard.Err() != nil {
			t.Error("work was cancelled by the first signal")
		}
		signals <- syscall.SIGTERM
		synctest.Wait()
		if hard.Err() == nil {
			t.Error("work goes on after the second signal")
		}
	})
}

func TestGraceStop(t *testing.T) {
	t.Parallel()
	hard, stop := Grace(t.Context(), time.Minute)
	stop()
	if hard.Err() == nil {
		t.Error("work goes on after stop")
	}
}
