package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/pkg/fault"
)

// Window is the time of day at which a loaded driver may be replaced. The zero value is the whole day.
type Window struct {
	// Never means that no loaded driver is replaced. A new driver waits for a reboot.
	Never bool
	// From and Until are times since midnight, UTC. Equal values mean the whole day. The window may include midnight.
	From, Until time.Duration
}

// ParseWindow parses any, never or HH:MM-HH:MM.
func ParseWindow(text string) (Window, error) {
	switch text {
	case "any":
		return Window{}, nil
	case "never":
		return Window{Never: true}, nil
	}
	from, until, ok := strings.Cut(text, "-")
	var w Window
	var errs [2]error
	w.From, errs[0] = clock(from)
	w.Until, errs[1] = clock(until)
	if !ok || errors.Join(errs[:]...) != nil || w.From == w.Until {
		return Window{}, fmt.Errorf("maintenance %q: want any, never, or times of the day in UTC such as 02:00-05:00", text)
	}
	return w, nil
}

func clock(text string) (time.Duration, error) {
	at, err := time.Parse("15:04", text)
	return time.Duration(at.Hour())*time.Hour + time.Duration(at.Minute())*time.Minute, err
}

// Closed returns the reason why the loaded driver may not be replaced now, or "".
func (w Window) Closed(now time.Time) string {
	if w.Never {
		return "with --maintenance never, only a reboot replaces the driver"
	}
	now = now.UTC()
	at := time.Duration(now.Hour())*time.Hour + time.Duration(now.Minute())*time.Minute
	open := w.From <= at && at < w.Until
	if w.From >= w.Until {
		open = at >= w.From || at < w.Until
	}
	if open {
		return ""
	}
	day := func(d time.Duration) string { return time.Time{}.Add(d).Format("15:04") }
	return fmt.Sprintf("the present time is outside the hours of --maintenance, %s to %s UTC", day(w.From), day(w.Until))
}

// PendingWatcher is a [Watcher] that also receives the reason why the node lacks the wanted driver, while a run waits
// for an idle GPU.
type PendingWatcher interface {
	Watcher
	// Pending receives the reason at each check of the loaded driver.
	Pending(why error)
}

// idlePause is the time between two checks whether programs use the driver.
const idlePause = 2 * time.Second

// probeWait is how long a rollback waits for the check of another fetcher, which uses the GPU for some seconds.
const probeWait = 10 * time.Second

// onlyProbeUses reports whether the check of a fetcher is the only program that uses the GPU. The program is nvmlprobe,
// or its copy on the node, probe.
func (s nodeState) onlyProbeUses() bool {
	return len(s.facts.Users) > 0 && !slices.ContainsFunc(s.facts.Users, func(u host.User) bool {
		return u.Command != "nvmlprobe" && u.Command != "probe"
	})
}

// pauseUntil waits for idlePause. It reports false if the context or the given time ends first.
func (a *Agent) pauseUntil(ctx context.Context, end time.Time) bool {
	if !a.parts.Now().Before(end) {
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(idlePause):
		return true
	}
}

// idleCheck is the time between two checks of the loaded driver, and between two reads of the node's label, while the
// agent waits for idle GPUs.
const idleCheck = time.Minute

// reportWaiting reports the state of the active driver to the watcher while another driver waits.
func (a *Agent) reportWaiting(ctx context.Context) {
	if a.watcher == nil {
		return
	}
	v, err := a.checkFor(ctx, a.watcher)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		a.parts.Log.WarnContext(ctx, "check failed", "err", err)
	} else {
		a.watcher.Report(v)
	}
	a.watcher.Alive()
}

// checkFor returns a verdict on the active driver, and tells the watcher how the check goes.
func (a *Agent) checkFor(ctx context.Context, w Watcher) (gpucheck.Verdict, error) {
	w.CheckStarted()
	v, err := a.checkDriver(ctx)
	if (err != nil || ctx.Err() != nil) && !errors.Is(err, gpucheck.ErrHung) {
		w.CheckStopped()
	}
	return v, err
}

// waitIdle waits until no program uses the loaded driver, at most until the given end. It waits only after an error of
// kind Busy. The result is true if the caller should try again. If the node's label changes meanwhile, waitIdle sets
// r.Relabelled and returns false.
func (a *Agent) waitIdle(ctx context.Context, r *Report, why error, end time.Time) bool {
	if a.cfg.WaitIdle <= 0 || a.cfg.NoLoad || !fault.Is(why, fault.Busy) || a.cfg.Maintenance.Closed(a.parts.Now()) != "" {
		return false
	}
	open := func() bool {
		mods, err := host.LoadedModules(a.node)
		return err == nil && (&host.Facts{Modules: mods}).Open()
	}
	if !open() {
		return false
	}
	a.parts.Log.InfoContext(ctx, "waiting until no program uses the GPU", "until", end.UTC(), "err", why)
	for looked := (time.Time{}); a.parts.Now().Before(end); {
		if now := a.parts.Now(); now.Sub(looked) >= idleCheck {
			looked = now
			a.reportWaiting(ctx)
			if w, ok := a.watcher.(PendingWatcher); ok {
				w.Pending(why)
			}
			if r.Relabelled = a.relabelled(ctx); r.Relabelled {
				return false
			}
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(idlePause):
		}
		if !open() {
			return true
		}
	}
	return false
}
