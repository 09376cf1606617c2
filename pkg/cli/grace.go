package cli

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Grace is for programs that finish their current work before they stop. The returned context is for that work. This
// context ends when the period has passed after the end of ctx, or at the second SIGINT or SIGTERM. A third signal
// kills the program. The caller must call stop, which also ends the context.
func Grace(ctx context.Context, period time.Duration) (hard context.Context, stop context.CancelFunc) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	hard, stop = grace(ctx, period, signals)
	context.AfterFunc(hard, func() { signal.Stop(signals) })
	return hard, stop
}

func grace(ctx context.Context, period time.Duration, signals <-chan os.Signal) (hard context.Context,
	stop context.CancelFunc) {
	hard, stop = context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer stop()
		var over <-chan time.Time
		done := ctx.Done()
		for count := 0; count < 2; {
			select {
			case <-hard.Done():
				return
			case <-over:
				return
			case <-done:
				timer := time.NewTimer(period)
				defer timer.Stop()
				over, done = timer.C, nil
			case <-signals:
				count++
			}
		}
	}()
	return hard, stop
}
