package catalogue

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// OpenLog opens the log of a build. If the build exists but has no log, the error has kind NotFound, and says whether
// the log will come, was removed, or was never sent.
func (c *Catalogue) OpenLog(ctx context.Context, id int64) (io.ReadSeekCloser, int64, error) {
	b, err := c.Store.Build(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	log, size, err := c.Logs.Get(id, b.State == api.Building)
	if fault.Is(err, fault.NotFound) {
		err = noLog(b)
	}
	return log, size, err
}

// noLog returns the error for a build without a log.
func noLog(b api.Build) error {
	text := fmt.Sprintf("build %d has no log: %s", b.ID, WhyNoLog(b))
	switch {
	case b.LogRemovedAt != nil:
		return logRemoved(b)
	case isOpen(&b):
		return fault.New(fault.NotFound, fmt.Sprintf("build %d has no log yet", b.ID),
			"wait until the builder has sent the log, and ask again")
	case b.State == api.Published:
		return fault.New(fault.NotFound, text, hintAttachedLog+b.Digest)
	case b.Worker == "":
		return fault.New(fault.NotFound, text, fmt.Sprintf("to see why the build ended, run: server build %d", b.ID))
	}
	return fault.New(fault.NotFound, text, "read what builder "+b.Worker+" itself logged; if several servers share the "+
		"database, ask the one to which the builder reports")
}

// WhyNoLog returns the reason why an ended build never had a log. Do not call it if the server has removed the log.
func WhyNoLog(b api.Build) string {
	switch {
	case b.Worker != "":
		return "its builder sent no log to this server"
	case b.State == api.Published:
		return "no builder ran, because the artifact was there already"
	}
	return "no builder worked on this build when the build ended"
}

// hintAttachedLog is a hint to which the digest of a published artifact is appended.
const hintAttachedLog = "read the log that is attached to the artifact, as docs/how-to/verify.md says; to see the " +
	"artifact's repository, run: server artifact "

// logRemoved returns the error for a log that the server has removed.
func logRemoved(b api.Build) error {
	text := fmt.Sprintf("the log of build %d was removed on %s to save space", b.ID,
		b.LogRemovedAt.UTC().Format(time.DateOnly))
	if b.FinishedAt != nil {
		text += fmt.Sprintf(", %d days after the build's end", int(b.LogRemovedAt.Sub(*b.FinishedAt).Hours()/24))
	}
	text += "; the flag --keep-logs of server serve says how long logs stay"
	if b.State == api.Published {
		return fault.New(fault.NotFound, text, hintAttachedLog+b.Digest)
	}
	return fault.New(fault.NotFound, text, fmt.Sprintf("read the log of the cell's first or last failure; to find it, "+
		"run: server builds --state failed --build-id %s --board %s --driver %s --flavour %s",
		b.Kernel.BuildID, b.Kernel.Board, b.Driver.Version, b.Driver.Flavour))
}

// PutLog stores the log of a build. If the build does not exist, PutLog returns an error.
func (c *Catalogue) PutLog(ctx context.Context, id int64, r io.Reader) error {
	if _, err := c.Store.Build(ctx, id); err != nil {
		return err
	}
	return c.Logs.Put(id, r)
}

// AppendLog adds to the log of a running build; see [store.Logs.Append].
func (c *Catalogue) AppendLog(ctx context.Context, id, offset int64, r io.Reader) error {
	b, err := c.Store.Build(ctx, id)
	if err != nil {
		return err
	}
	if b.State != api.Building {
		return fault.New(fault.Mismatch, fmt.Sprintf("append to the log: build %d is %s, not building", id, b.State), "")
	}
	return c.Logs.Append(id, offset, r)
}
