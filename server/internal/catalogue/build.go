package catalogue

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// Caller says which requests of a caller are refused. The zero value means none.
type Caller struct {
	// KnownOnly is true if requests for kernels that are not in the catalogue are refused. The server looks such a kernel
	// up in its mirror later.
	KnownOnly bool
	// Allow is called before a build is added, but not if the build exists already. If it returns an error, the request
	// is refused. nil means no limit.
	Allow func() error
}

// Request requests a build of a cell. It returns the cell's published or open build. If the cell has no such build,
// Request adds one, even if the last build failed.
func (c *Catalogue) Request(ctx context.Context, r api.BuildRequest) (api.Build, error) {
	return c.RequestAs(ctx, r, Caller{})
}

// RequestAs does what [Catalogue.Request] does, for a caller with limits.
func (c *Catalogue) RequestAs(ctx context.Context, r api.BuildRequest, by Caller) (api.Build, error) {
	w, err := parseWish(r.BuildID, r.Board, r.Driver, r.Flavour)
	if err != nil {
		return api.Build{}, fmt.Errorf("request a build: %w", err)
	}
	find := c.find
	if by.KnownOnly {
		find = c.findKnown
	}
	cells, known, err := find(ctx, w.kernel)
	if err != nil {
		return api.Build{}, fmt.Errorf("request a build: %w", err)
	}
	k := cells.Kernel
	version, reason, hint := w.version(k, known)
	if version == "" {
		return api.Build{}, fault.New(fault.InputMissing, "request a build: "+reason, hint)
	}
	rel, err := c.Store.Driver(ctx, version)
	if err != nil {
		return api.Build{}, err
	}
	// Choose an allowed flavour whose cell is already published, building or queued. Otherwise choose the first one
	// that can be built. The preferred flavour comes first.
	var chosen *api.Resolution
	var refusal string
	for _, f := range w.candidates(version) {
		d := target.Driver{Version: version, Flavour: f}
		if why := whyUnsupported(rel, d); why != "" {
			refusal = orText(refusal, why)
			continue
		}
		cell := resolution(k, rel, d, cells.Facts(d))
		live := cell.State == api.Published || cell.State == api.Building || cell.State == api.Queued
		if chosen == nil || (live && rank(cell.State) < rank(chosen.State)) {
			chosen = &cell
		}
	}
	if chosen == nil {
		return api.Build{}, fault.New(
			fault.Unsupported,
			"request a build: "+refusal,
			"choose another flavour or another driver version",
		)
	}
	live := chosen.State == api.Published || chosen.State == api.Building || chosen.State == api.Queued
	if by.Allow != nil && !live {
		if err := by.Allow(); err != nil {
			return api.Build{}, fmt.Errorf("request a build: %w", err)
		}
	}
	b, _, err := c.openCell(ctx, k, *chosen, queue.PriorityAsked, 1)
	return b, err
}

// openCell adds and queues a build of a cell, or returns its published or open build. It raises the priority of a
// waiting build if necessary. tries is the value of the field Tries of a new build. For a withdrawn artifact, the error
// has kind Unsupported. queued reports whether the build is new and waits for a builder.
func (c *Catalogue) openCell(
	ctx context.Context, k api.Kernel, cell api.Resolution, priority, tries int,
) (b api.Build, queued bool, err error) {
	now := c.Now()
	b = api.Build{Kernel: k.Kernel, Driver: cell.Driver, State: api.Queued, Priority: priority, Tries: tries,
		CreatedAt: now}
	switch cell.State {
	case api.Yanked:
		return b, false, fault.New(fault.Unsupported,
			"request of a build refused: the artifact was yanked (reason: "+cell.Reason+")",
			"choose another driver version; if this artifact is good after all, run: server unyank DIGEST")
	case api.Quarantined:
		return b, false, fault.New(fault.Unsupported,
			"request of a build refused: the artifact is in quarantine (reason: "+cell.Reason+")", cell.Hint)
	case api.Published:
		if cell.Build != nil && cell.Build.State == api.Published && cell.Build.Digest == cell.Digest {
			return *cell.Build, false, nil
		}
		// The artifact is not from a build of this server, so a new published build stands for it.
		b.State, b.Digest, b.FinishedAt = api.Published, cell.Digest, &now
		b, _, err = c.add(ctx, b, cell.Build)
		return b, false, err
	}
	if k.SeenAt.IsZero() { // each build needs its kernel in the catalogue; without a mirror, nothing else adds it
		if err := c.RecordKernel(ctx, k); err != nil {
			return b, false, err
		}
	}
	b, queued, err = c.add(ctx, b, cell.Build)
	switch {
	case err != nil:
		return b, false, err
	case !queued && b.State == api.Queued && b.Priority > priority:
		b, err = c.raisePriority(ctx, b, priority)
		return b, false, err
	case !queued:
		return b, false, nil
	}
	c.Log.InfoContext(ctx, "build requested", "build", b.ID, "kernel", b.Kernel.String(), "driver", b.Driver.String())
	c.changeQueueAfterTx(ctx, "build not queued yet", b.ID, func(q Enqueuer) error { return c.enqueue(ctx, q, b) })
	return b, true, nil
}

// changeQueueInTx changes the queue in the given transaction if queue and catalogue are in one database. Otherwise it
// does nothing, and [Catalogue.changeQueueAfterTx] changes the queue.
func (c *Catalogue) changeQueueInTx(tx *store.Tx, change func(Enqueuer) error) error {
	if c.Within == nil {
		return nil
	}
	return change(c.Within(tx))
}

// changeQueueAfterTx changes the queue if it has its own database. An error is only logged, because the sweep of
// package jobs repeats the change.
func (c *Catalogue) changeQueueAfterTx(ctx context.Context, trouble string, id int64, change func(Enqueuer) error) {
	if c.Within != nil {
		return
	}
	if err := change(c.Queue); err != nil {
		c.Log.WarnContext(ctx, trouble, "build", id, "err", err)
	}
}

// errPublished makes a transaction roll back if the cell was published meanwhile.
var errPublished = errors.New("the cell was published meanwhile")

// add stores a new build, unless the cell has an open build, which add returns instead. seen is the newest build that
// the caller read, or nil. If a build was published since then, add returns that build.
func (c *Catalogue) add(ctx context.Context, b api.Build, seen *api.Build) (stored api.Build, added bool, err error) {
	err = c.Store.Write(ctx, func(tx *store.Tx) (err error) {
		if stored, added, err = tx.AddBuild(ctx, b); err != nil || !added || stored.State != api.Queued {
			return err
		}
		// Read the former build after the insert: the insert shows that no build of the cell is open any more. Before
		// it, another PostgreSQL transaction could still end a build unseen.
		before, found, err := tx.BuildBefore(ctx, stored)
		if err != nil {
			return err
		}
		known := seen != nil && seen.ID == before.ID && seen.State == api.Published
		if found && before.State == api.Published && !known {
			stored, added = before, false
			return errPublished
		}
		return c.changeQueueInTx(tx, func(q Enqueuer) error { return c.enqueue(ctx, q, stored) })
	})
	if errors.Is(err, errPublished) {
		err = nil
	}
	return stored, added, err
}

// raisePriority gives a waiting build a higher priority. If the new priority is that of a request, the count of the
// cell's tries begins again.
func (c *Catalogue) raisePriority(ctx context.Context, b api.Build, priority int) (api.Build, error) {
	up := func(q Enqueuer) error { return q.SetPriority(ctx, b.ID, priority) }
	err := c.Store.Write(ctx, func(tx *store.Tx) (err error) {
		if b, err = tx.Build(ctx, b.ID); err != nil || b.State != api.Queued || b.Priority <= priority {
			return err
		}
		b.Priority = priority
		if priority == queue.PriorityAsked {
			b.Tries = 1
		}
		if err := tx.SetBuild(ctx, b); err != nil {
			return err
		}
		return c.changeQueueInTx(tx, up)
	})
	if err == nil {
		c.changeQueueAfterTx(ctx, "build not raised", b.ID, up) // the build runs all the same, only later
	}
	return b, err
}

// Cancel ends a build. A waiting build leaves the queue. The builder of a running build stops when the response to its
// next report says so.
func (c *Catalogue) Cancel(ctx context.Context, id int64) (api.Build, error) {
	out := func(q Enqueuer) error { return q.Cancel(ctx, id) }
	b, err := c.update(ctx, id, api.BuildUpdate{State: api.Cancelled},
		func(tx *store.Tx) error { return c.changeQueueInTx(tx, out) })
	if err == nil {
		c.changeQueueAfterTx(ctx, "job not cancelled yet", id, out)
	}
	return b, err
}

// Enqueue puts a stored build into the queue if the queue has no job for it any more. The attempts of the new job are
// counted from 1, so Enqueue forgets the former attempts. Otherwise the new attempts would count as superseded.
func (c *Catalogue) Enqueue(ctx context.Context, b api.Build) error {
	if b.Attempt > 0 {
		err := c.Store.Write(ctx, func(tx *store.Tx) error {
			b, err := tx.Build(ctx, b.ID)
			if err != nil || b.State != api.Queued || b.Attempt == 0 {
				return err
			}
			b.Attempt = 0
			return tx.SetBuild(ctx, b)
		})
		if err != nil {
			return err
		}
	}
	return c.enqueue(ctx, c.Queue, b)
}

func (c *Catalogue) enqueue(ctx context.Context, q Enqueuer, b api.Build) error {
	return q.Insert(ctx, api.BuildJob{
		Build: b.ID, BuildID: b.Kernel.BuildID, Board: b.Kernel.Board,
		Driver: b.Driver.Version, Flavour: string(b.Driver.Flavour),
		KernelMirror: c.KernelMirror, DriverMirror: c.DriverMirror,
	}, b.Priority)
}

// OpenBuilds lists the builds that are queued or building.
func (c *Catalogue) OpenBuilds(ctx context.Context) ([]api.Build, error) {
	return c.Store.OpenBuilds(ctx)
}

// HasBuilds reports whether the catalogue has any build, open or ended.
func (c *Catalogue) HasBuilds(ctx context.Context) (bool, error) {
	all, _, err := c.Store.Builds(ctx, store.BuildFilter{}, store.Page{Limit: 1})
	return len(all) > 0, err
}

// Abandon marks an open build as failed if no builder will work on it again. The build keeps the error of its last
// attempt, or gets the given reason.
func (c *Catalogue) Abandon(ctx context.Context, id int64, why string) error {
	b, err := c.Store.Build(ctx, id)
	if err != nil {
		return err
	}
	if !isOpen(&b) {
		return nil // the end of the build was reported meanwhile
	}
	u := api.BuildUpdate{State: api.Failed, Class: fault.Internal.String(), Error: why,
		Hint: "request the build again: server request"}
	if b.Class != "" {
		u.Class, u.Error, u.Hint = b.Class, b.Error, orText(b.Hint, u.Hint)
	}
	_, err = c.Update(ctx, id, u)
	return err
}

// Update applies a builder's report to a build.
func (c *Catalogue) Update(ctx context.Context, id int64, u api.BuildUpdate) (api.Build, error) {
	return c.update(ctx, id, u, func(*store.Tx) error { return nil })
}

// update is [Catalogue.Update]. It also calls more in the same transaction.
func (c *Catalogue) update(
	ctx context.Context, id int64, u api.BuildUpdate, more func(*store.Tx) error,
) (api.Build, error) {
	// Keep only the first line, which fits a table. The build's log has the whole text.
	u.Error, u.Hint = firstLine(u.Error), firstLine(u.Hint)
	for i := range u.Phases {
		p := &u.Phases[i]
		p.Name, p.Note, p.Of = firstLine(p.Name), firstLine(p.Note), firstLine(p.Of)
	}
	if err := checkUpdate(u); err != nil {
		return api.Build{}, fault.Wrap(fault.Usage, fmt.Errorf("update the state of build %d: %w", id, err), "")
	}
	e, err := eventOf(u)
	if err != nil {
		return api.Build{}, fault.Wrap(fault.Usage, fmt.Errorf("update the state of build %d: %w", id, err), "")
	}
	var before, after api.Build
	var refusal error
	err = c.Store.Write(ctx, func(tx *store.Tx) (err error) {
		refusal = nil
		if before, err = tx.Build(ctx, id); err != nil {
			return err
		}
		if after, err = apply(before, e, u, c.Now()); err != nil {
			return err
		}
		if !tooLate(before, e, u) {
			err = c.recordKernel(ctx, tx, before, u)
		}
		if err == nil && e == publish {
			err = c.recordArtifact(ctx, tx, before, u)
		}
		if e == publish && isRefusal(err) {
			refusal = err
			after, err = refusePublication(ctx, tx, before, u, err, c.Now())
			return err
		}
		if err != nil {
			return err
		}
		if err := tx.SetBuild(ctx, after); err != nil {
			return err
		}
		return more(tx)
	})
	if err != nil {
		return after, fmt.Errorf("update the state of build %d: %w", id, err)
	}
	if after.State != before.State {
		c.Log.InfoContext(ctx, "build changed", "build", id, "state", after.State, "class", after.Class, "digest",
			after.Digest)
	}
	if refusal != nil {
		return after, fmt.Errorf("update the state of build %d: %w", id, refusal)
	}
	return after, nil
}

// isRefusal reports whether the publication is refused for good. After any other error, the builder repeats its report.
func isRefusal(err error) bool {
	return err != nil && !fault.Of(err).Retryable() && !fault.Is(err, fault.Internal)
}

// refusePublication marks a build as failed because its publication was refused. Its builder sends no other report, and
// another attempt would be refused, too.
func refusePublication(
	ctx context.Context, tx *store.Tx, b api.Build, u api.BuildUpdate, why error, at time.Time,
) (api.Build, error) {
	u.State, u.Class = api.Failed, fault.Of(why).String()
	u.Error, u.Hint = firstLine(why.Error()), firstLine(fault.Hint(why))
	after, err := apply(b, fail, u, at)
	if err != nil {
		return b, why // the build is published already
	}
	return after, tx.SetBuild(ctx, after)
}

// firstLine returns the first line of a text, with at most maxLine bytes of valid UTF-8.
func firstLine(text string) string {
	text, _, _ = strings.Cut(strings.TrimSpace(text), "\n")
	for len(text) > maxLine {
		_, size := utf8.DecodeLastRuneInString(text)
		text = text[:len(text)-size]
	}
	return strings.ToValidUTF8(text, "?")
}

func checkUpdate(u api.BuildUpdate) error {
	for name, text := range map[string]string{"phase": u.Phase, "worker": u.Worker} {
		if err := checkLine(name, text); err != nil {
			return err
		}
	}
	if u.Repository != "" {
		if err := checkRepository(u.Repository); err != nil {
			return err
		}
	}
	if u.Kernel != nil {
		if err := u.Kernel.Check(); err != nil {
			return err
		}
	}
	if len(u.Phases) > maxPhases {
		return fmt.Errorf("the update has %d phases; want at most %d phases", len(u.Phases), maxPhases)
	}
	if u.Fingerprint != "" {
		if _, err := target.ParseFingerprint(string(u.Fingerprint)); err != nil {
			return err
		}
	}
	if u.Digest != "" && !digestPattern.MatchString(u.Digest) {
		return fmt.Errorf("digest %q: want sha256: and 64 lower-case hex digits", u.Digest)
	}
	if u.State == api.Published && u.Digest == "" {
		return fmt.Errorf("the update of a published build needs a digest")
	}
	if u.Class != "" || u.State == api.Failed {
		if err := CheckClass(u.Class); err != nil {
			return fmt.Errorf("the update of a failed build needs a class: %w", err)
		}
	}
	return nil
}

// recordKernel stores the facts about the kernel that a builder reported.
func (c *Catalogue) recordKernel(ctx context.Context, tx *store.Tx, b api.Build, u api.BuildUpdate) error {
	if u.Kernel == nil && u.Fingerprint == "" {
		return nil
	}
	k := api.Kernel{Kernel: b.Kernel, Fingerprint: u.Fingerprint}
	if u.Kernel != nil {
		k.Kernel = *u.Kernel
	}
	old, known, err := tx.Kernel(ctx, k.BuildID, k.Board)
	if err != nil {
		return err
	}
	if known && old.Fingerprint != "" && k.Fingerprint != "" && old.Fingerprint != k.Fingerprint {
		// The mirror must have changed, because a COS build never does. A wrong mirror or builder must not make published
		// artifacts unusable for nodes.
		held, err := tx.Published(ctx, k.BuildID, k.Board)
		if err != nil {
			return err
		}
		if held && u.State != api.Failed && u.State != api.Queued {
			return fault.New(
				fault.Mismatch,
				fmt.Sprintf("kernel %s has fingerprint %s and published artifacts, but the builder reports fingerprint %s", k,
					old.Fingerprint.Short(), k.Fingerprint.Short()),
				"compare the kernel headers in the mirror with Google's; if the new ones are right, delete the kernel's "+
					"published artifacts from this server's registry, and free the tags of each: server free-tags DIGEST; "+
					"yank those in another registry: server yank DIGEST --reason WHY; then "+
					requestHint(api.Kernel{Kernel: k.Kernel}, b.Driver),
			)
		}
		if held { // the report of a failure still counts
			return nil
		}
		c.Log.WarnContext(
			ctx,
			"kernel fingerprint changed",
			"kernel",
			k.String(),
			"old",
			old.Fingerprint.Short(),
			"new",
			k.Fingerprint.Short(),
		)
	}
	k.SeenAt = c.Now()
	return tx.PutKernel(ctx, k)
}

// recordArtifact stores the artifact of a build that its builder reports as published.
func (c *Catalogue) recordArtifact(ctx context.Context, tx *store.Tx, b api.Build, u api.BuildUpdate) error {
	k, _, err := tx.Kernel(ctx, b.Kernel.BuildID, b.Kernel.Board)
	if err != nil {
		return err
	}
	fingerprint := u.Fingerprint
	if fingerprint == "" {
		fingerprint = k.Fingerprint
	}
	if fingerprint == "" {
		return fault.New(
			fault.Usage,
			fmt.Sprintf("record the artifact of build %d: no builder reported the kernel's fingerprint", b.ID),
			"send the field fingerprint in the update of the build",
		)
	}
	return c.addArtifact(ctx, tx, api.Artifact{
		Digest: u.Digest, Repository: u.Repository, Fingerprint: fingerprint, Driver: b.Driver,
		Arch: k.Arch, Release: k.Release, Kernels: []target.Kernel{k.Kernel},
	})
}
