package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

// clock formats a time in the local zone. It includes the date if the time is more than 12 hours away.
func clock(t time.Time) string {
	if time.Until(t) > 12*time.Hour {
		return t.Local().Format("2006-01-02 15:04")
	}
	return t.Local().Format("15:04")
}

// positionInterval is the pause between two requests for a place in the queue. againAfter is the pause before a retry.
const (
	positionInterval = 10 * time.Second
	againAfter       = time.Second
)

// progress is a build, and its place in the queue while the build is open.
type progress struct {
	api.Build
	// Position and ETA are copied from [api.Resolution].
	Position int        `json:"position,omitempty"`
	ETA      *time.Time `json:"eta,omitempty"`
}

func (p progress) ended() bool { return p.State != api.Queued && p.State != api.Building }

// text returns the line that a person reads. [follow] reports a state only if this text changed.
func (p progress) text() string {
	parts := []string{strings.TrimSpace(string(p.State) + " " + p.Phase)}
	if p.ended() {
		parts[0] = string(p.State)
	}
	if p.Position > 0 {
		parts = append(parts, fmt.Sprintf("number %d in the queue", p.Position))
	}
	if p.State == api.Building && p.Attempt > 1 {
		parts = append(parts, fmt.Sprintf("attempt %d", p.Attempt))
	}
	if p.ETA != nil {
		parts = append(parts, "ready about "+clock(*p.ETA))
	}
	return strings.Join(parts, ", ")
}

// follow waits until a build ends. It passes each change of the text to say. Each time that the server stops
// responding, it calls away once, and waits for the server.
func follow(
	ctx context.Context, c *api.Client, b api.Build, away func(error), say func(progress) error,
) (api.Build, error) {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	events, broke := make(chan api.Build), make(chan error, 1)
	watch := func() {
		broke <- api.Watch(ctx, c, b.ID, func(b api.Build) error {
			select {
			case events <- b:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
	}
	watching.Go(watch)
	tick := time.NewTicker(positionInterval)
	defer tick.Stop()
	again := time.NewTimer(0)
	again.Stop()
	defer again.Stop()
	now, last, gone := progress{Build: b}, "", false
	for {
		now = queuePosition(ctx, c, now)
		if text := now.text(); text != last {
			last = text
			if err := say(now); err != nil {
				return now.Build, err
			}
		}
		if now.ended() {
			return now.Build, nil
		}
		select {
		case <-ctx.Done():
			return now.Build, fault.Wrap(fault.Cancelled, context.Cause(ctx), "")
		case next := <-events:
			now.Build, gone = next, false
		case <-tick.C:
		case err := <-broke:
			if err != nil && !fault.Of(err).Retryable() {
				return now.Build, err
			}
			if err != nil && !gone {
				away(err)
			}
			gone = true
			again.Reset(againAfter)
		case <-again.C:
			watching.Go(watch)
		}
	}
}

// queuePosition updates an open build's place in the queue. On an error, it keeps the last place, because the watch
// reports the same error.
func queuePosition(ctx context.Context, c *api.Client, now progress) progress {
	if now.State != api.Queued {
		now.Position = 0
	}
	if now.ended() {
		now.ETA = nil
		return now
	}
	r, err := c.Resolve(ctx, api.Question{BuildID: now.Kernel.BuildID, Board: now.Kernel.Board,
		Driver: now.Driver.Version, Flavour: string(now.Driver.Flavour)})
	if err != nil || r.Build == nil || r.Build.ID != now.ID || r.State != now.State {
		return now
	}
	was := now.ETA
	now.Position, now.ETA = r.Position, r.ETA
	// Keep the former time if it changes by less than a minute, so that no new line is printed.
	if was != nil && now.ETA != nil && now.ETA.Sub(*was).Abs() < time.Minute {
		now.ETA = was
	}
	return now
}

// waitForBuild waits until a build ends, and prints a line for each change.
func waitForBuild(ctx context.Context, c *api.Client, b api.Build, w io.Writer) (api.Build, error) {
	return follow(ctx, c, b, reportUnreachable(w), func(p progress) error {
		fmt.Fprintf(w, "build %d: %s\n", p.ID, p.text())
		return nil
	})
}

func reportUnreachable(w io.Writer) func(error) {
	return func(err error) { fmt.Fprintf(w, "waiting for the server: %v\n", err) }
}

func watchCommand() *ucli.Command {
	return &ucli.Command{
		Name: "watch", Usage: "follow a build, or the build of a cell, until it ends", ArgsUsage: "[ID]",
		Description: `ID is the number of a build. Without ID, the flags name the cell. The command
prints a line for each change; with --output json each line is an object.

The exit status is 0 if the artifact is published. If the build failed, the exit
status is the one of the failure's class (docs/reference/exit-codes.md). If
nobody builds the cell, the exit status is 3.

Example:
  server watch 12
  server watch --build-id 17800.66.78 --driver R535`,
		Flags: clientFlags(cellFlags(false)...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			c, err := client(cmd)
			if err != nil {
				return err
			}
			b, err := buildToWatch(ctx, c, cmd)
			if err != nil {
				return err
			}
			b, err = follow(ctx, c, b, reportUnreachable(cmd.Root().ErrWriter), func(p progress) error {
				return cli.PrintOne(cmd, p, func(w io.Writer) error {
					_, err := fmt.Fprintf(w, "%s  %s\n", time.Now().Format(time.TimeOnly), p.text())
					return err
				})
			})
			if err != nil {
				return err
			}
			return errUnlessPublished(true, b)
		},
	}
}

// buildToWatch returns the build that the arguments and flags of the command select.
func buildToWatch(ctx context.Context, c *api.Client, cmd *ucli.Command) (api.Build, error) {
	asked := cellOf(cmd)
	switch {
	case cmd.Args().Len() == 1:
		id, err := strconv.ParseInt(cmd.Args().First(), 10, 64)
		if err != nil {
			return api.Build{}, fault.New(fault.Usage,
				fmt.Sprintf("%s needs the number of a build, got %q", cmd.FullName(), cmd.Args().First()),
				"take the number from the list of builds: server builds")
		}
		return c.Build(ctx, id)
	case cmd.Args().Len() > 1 || asked.BuildID == "":
		return api.Build{}, fault.New(fault.Usage, cmd.FullName()+" needs the number of one build, or flags for one cell",
			"to follow a build: server watch ID; to follow the build of a cell: server watch --build-id 17800.66.78; "+
				"to list the builds: server builds")
	}
	r, err := c.Resolve(ctx, asked.question())
	if err != nil {
		return api.Build{}, err
	}
	if r.Build == nil || r.State.Withdrawn() {
		// There is nothing to wait for: the artifact was published elsewhere, or it was published and then withdrawn.
		if err := cellError(asked, r); err != nil {
			return api.Build{}, err
		}
		return api.Build{State: api.Published, Kernel: r.Kernel, Driver: r.Driver, Digest: r.Digest}, nil
	}
	return *r.Build, nil
}
