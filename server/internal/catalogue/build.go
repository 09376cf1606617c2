package catalogue

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Request asks for a cell to be built. A published cell returns its finished
// build, an open one the open build; a failed one is tried anew.
func (c *Catalogue) Request(ctx context.Context, r api.BuildRequest) (api.Build, error) {
	w, err := parseWish(r.BuildID, r.Board, r.Driver, r.Flavour)
	if err != nil {
		return api.Build{}, fmt.Errorf("request build: %w", err)
	}
	k, known, err := c.Store.Kernel(ctx, r.BuildID, r.Board)
	if err != nil {
		return api.Build{}, err
	}
	if !known {
		k.Kernel = w.kernel
	}
	version, reason, hint := w.version(k, known)
	if version == "" {
		return api.Build{}, fault.New(fault.InputMissing, "request build: "+reason, hint)
	}
	rel, err := c.release(ctx, version)
	if err != nil {
		return api.Build{}, err
	}
	// Of the flavours that the wish allows: one that is published or open, else
	// the preferred one among those that can be built at all.
	var chosen *api.Resolution
	var refusal string
	for _, f := range w.candidates(version) {
		d := target.Driver{Version: version, Flavour: f}
		if why := never(rel, d); why != "" {
			refusal = orText(refusal, why)
			continue
		}
		cell, err := c.cell(ctx, k, rel, d)
		if err != nil {
			return api.Build{}, err
		}
		live := cell.State == api.Published || cell.State == api.Building || cell.State == api.Queued
		if chosen == nil || (live && rank(cell.State) < rank(chosen.State)) {
			chosen = &cell
		}
	}
	if chosen == nil {
		return api.Build{}, fault.New(fault.Unsupported, "request build: "+refusal, "choose the other flavour, or another version")
	}
	return c.open(ctx, k, *chosen)
}

func (c *Catalogue) open(ctx context.Context, k api.Kernel, cell api.Resolution) (api.Build, error) {
	now := c.Now()
	b := api.Build{Kernel: k.Kernel, Driver: cell.Driver, State: api.Queued, CreatedAt: now}
	switch cell.State {
	case api.Yanked:
		return b, fault.New(fault.Unsupported, "request build: the artifact was yanked: "+cell.Reason,
			"choose another driver version, or take the yank back: POST /v1/artifacts/{digest}/unyank")
	case api.Published:
		if cell.Build != nil && cell.Build.State == api.Published && cell.Build.Digest == cell.Digest {
			return *cell.Build, nil
		}
		// Published by other means than a build of this server: say so with one.
		b.State, b.Digest, b.FinishedAt = api.Published, cell.Digest, &now
		b, _, err := c.Store.AddBuild(ctx, b)
		return b, err
	}
	b, added, err := c.Store.AddBuild(ctx, b)
	if err != nil || !added {
		return b, err
	}
	c.Log.InfoContext(ctx, "build requested", "build", b.ID, "kernel", b.Kernel.String(), "driver", b.Driver.String())
	if err := c.Enqueue(ctx, b); err != nil {
		// The build is stored; the sweep of package jobs queues it later.
		c.Log.WarnContext(ctx, "build not queued yet", "build", b.ID, "err", err)
	}
	return b, nil
}

// Enqueue puts a stored build into the queue.
func (c *Catalogue) Enqueue(ctx context.Context, b api.Build) error {
	return c.Queue.Insert(ctx, api.BuildJob{
		Build: b.ID, BuildID: b.Kernel.BuildID, Board: b.Kernel.Board,
		Driver: b.Driver.Version, Flavour: string(b.Driver.Flavour),
		KernelMirror: c.KernelMirror, DriverMirror: c.DriverMirror,
	})
}

// OpenBuilds lists the builds that are queued or building.
func (c *Catalogue) OpenBuilds(ctx context.Context) ([]api.Build, error) {
	return c.Store.OpenBuilds(ctx)
}

// Abandon fails an open build that no worker will touch again. What the last
// try said of itself tells more than that it was the last.
func (c *Catalogue) Abandon(ctx context.Context, id int64, why string) error {
	b, err := c.Store.Build(ctx, id)
	if err != nil {
		return err
	}
	if b.State != api.Queued && b.State != api.Building {
		return nil // its end was reported meanwhile
	}
	u := api.BuildUpdate{State: api.Failed, Class: fault.Internal.String(), Error: why, Hint: "ask for the build again"}
	if b.Class != "" {
		u.Class, u.Error, u.Hint = b.Class, b.Error, orText(b.Hint, u.Hint)
	}
	_, err = c.Update(ctx, id, u)
	return err
}

// next holds the allowed transitions. A state may always follow itself. A
// failed build may come back, since the queue retries what may pass; a
// published one is final.
var next = map[api.State][]api.State{
	api.Queued:    {api.Building, api.Published, api.Failed, api.Cancelled},
	api.Building:  {api.Queued, api.Published, api.Failed, api.Cancelled},
	api.Failed:    {api.Queued, api.Building},
	api.Cancelled: {api.Queued, api.Building},
}

// bounds of what a builder may say in one field.
const (
	maxLine   = 4 << 10
	maxPhases = 200
)

// Update applies what a builder reports of a build.
func (c *Catalogue) Update(ctx context.Context, id int64, u api.BuildUpdate) (api.Build, error) {
	// The builder's log has the whole text; the catalogue keeps what fits a table.
	u.Error, u.Hint = firstLine(u.Error), firstLine(u.Hint)
	if err := checkUpdate(u); err != nil {
		return api.Build{}, fault.Wrap(fault.Usage, fmt.Errorf("update build %d: %w", id, err), "")
	}
	before, err := c.Store.Build(ctx, id)
	if err != nil {
		return before, err
	}
	if _, err := changed(before, u, c.Now); err != nil {
		return before, fmt.Errorf("update build %d: %w", id, err)
	}
	// The kernel and the artifact come first: whoever reads a published build
	// must find its artifact.
	if err := c.learnKernel(ctx, before, u); err != nil {
		return before, err
	}
	if u.State == api.Published {
		if err := c.learnArtifact(ctx, before, u); err != nil {
			return before, err
		}
	}
	after, err := c.Store.ChangeBuild(ctx, id, func(b *api.Build) error {
		merged, err := changed(*b, u, c.Now)
		if err == nil {
			*b = merged
		}
		return err
	})
	if err != nil {
		return after, fmt.Errorf("update build %d: %w", id, err)
	}
	if after.State != before.State {
		c.Log.InfoContext(ctx, "build changed", "build", id, "state", after.State, "class", after.Class, "digest", after.Digest)
	}
	return after, nil
}

// firstLine cuts a text to its first line and to what the catalogue keeps.
func firstLine(text string) string {
	text, _, _ = strings.Cut(strings.TrimSpace(text), "\n")
	for len(text) > maxLine {
		_, size := utf8.DecodeLastRuneInString(text)
		text = text[:len(text)-size]
	}
	return strings.ToValidUTF8(text, "?")
}

func checkUpdate(u api.BuildUpdate) error {
	for name, text := range map[string]string{"phase": u.Phase, "worker": u.Worker, "repository": u.Repository} {
		if len(text) > maxLine {
			return fmt.Errorf("%s is longer than %d bytes", name, maxLine)
		}
	}
	if len(u.Phases) > maxPhases {
		return fmt.Errorf("%d phases; at most %d", len(u.Phases), maxPhases)
	}
	if u.Fingerprint != "" {
		if _, err := target.ParseFingerprint(string(u.Fingerprint)); err != nil {
			return err
		}
	}
	if u.Digest != "" && !digestPattern.MatchString(u.Digest) {
		return fmt.Errorf("digest %q: want sha256: and 64 lower-case hex digits", u.Digest)
	}
	switch u.State {
	case "", api.Queued, api.Building, api.Cancelled:
	case api.Published:
		if u.Digest == "" {
			return fmt.Errorf("a published build needs a digest")
		}
	case api.Failed:
		if _, err := fault.Parse(u.Class); err != nil || u.Class == "" {
			return fmt.Errorf("a failed build needs a class: %q is not one", u.Class)
		}
	default:
		return fmt.Errorf("state %q is not one of a build", u.State)
	}
	return nil
}

// changed merges an update into a build, or says why that may not be.
func changed(b api.Build, u api.BuildUpdate, now func() time.Time) (api.Build, error) {
	if u.Kernel != nil {
		if u.Kernel.BuildID != b.Kernel.BuildID || u.Kernel.Board != b.Kernel.Board {
			return b, fault.New(fault.Mismatch, fmt.Sprintf("it is of kernel %s, not %s", b.Kernel, *u.Kernel), "")
		}
		b.Kernel = *u.Kernel
	}
	// After a worker was killed, the next attempt finds the build building.
	again := u.State == api.Building && b.State == api.Building && u.Attempt > b.Attempt
	if u.State != "" && (u.State != b.State || again) {
		if !again && !slices.Contains(next[b.State], u.State) {
			return b, fault.New(fault.Mismatch, fmt.Sprintf("it is %s and cannot become %s", b.State, u.State), "")
		}
		at := now()
		switch u.State {
		case api.Queued:
			b.Phase, b.Worker, b.StartedAt, b.FinishedAt = "", "", nil, nil
		case api.Building:
			b.StartedAt, b.FinishedAt, b.Phase = &at, nil, ""
			b.Class, b.Error, b.Hint, b.Phases = "", "", "", nil
		case api.Failed, api.Cancelled:
			b.FinishedAt = &at
		case api.Published:
			b.FinishedAt = &at
			b.Class, b.Error, b.Hint = "", "", ""
		}
		b.State = u.State
	} else if b.State == api.Published && u.Digest != "" && u.Digest != b.Digest {
		return b, fault.New(fault.Mismatch, "it is published as "+b.Digest, "")
	}
	set := func(field *string, value string) {
		if value != "" {
			*field = value
		}
	}
	set(&b.Phase, u.Phase)
	set(&b.Worker, u.Worker)
	set(&b.Digest, u.Digest)
	if b.State == api.Failed || b.State == api.Queued { // queued: of the try before
		set(&b.Class, u.Class)
		set(&b.Error, u.Error)
		set(&b.Hint, u.Hint)
	}
	if u.Attempt > 0 {
		b.Attempt = u.Attempt
	}
	if u.Phases != nil {
		b.Phases = u.Phases
	}
	return b, nil
}

// learnKernel stores what a builder found out about the kernel.
func (c *Catalogue) learnKernel(ctx context.Context, b api.Build, u api.BuildUpdate) error {
	if u.Kernel == nil && u.Fingerprint == "" {
		return nil
	}
	k := api.Kernel{Kernel: b.Kernel, Fingerprint: u.Fingerprint}
	if u.Kernel != nil {
		k.Kernel = *u.Kernel
	}
	old, known, err := c.Store.Kernel(ctx, k.BuildID, k.Board)
	if err != nil {
		return err
	}
	if known && old.Fingerprint != "" && k.Fingerprint != "" && old.Fingerprint != k.Fingerprint {
		// COS builds do not change, so the mirror's did. The newest reading
		// counts, and artifacts of the old fingerprint stop matching.
		c.Log.WarnContext(ctx, "kernel fingerprint changed", "kernel", k.String(), "old", old.Fingerprint.Short(), "new", k.Fingerprint.Short())
	}
	return c.SawKernel(ctx, k)
}

// learnArtifact stores the artifact of a build that is about to be published.
func (c *Catalogue) learnArtifact(ctx context.Context, b api.Build, u api.BuildUpdate) error {
	k, _, err := c.Store.Kernel(ctx, b.Kernel.BuildID, b.Kernel.Board)
	if err != nil {
		return err
	}
	fingerprint := u.Fingerprint
	if fingerprint == "" {
		fingerprint = k.Fingerprint
	}
	if fingerprint == "" {
		return fault.New(fault.Usage, fmt.Sprintf("publish build %d: nobody reported the kernel's fingerprint", b.ID), "send it in the update")
	}
	_, err = c.AddArtifact(ctx, api.Artifact{
		Digest: u.Digest, Repository: u.Repository, Fingerprint: fingerprint, Driver: b.Driver,
		Arch: k.Arch, Release: k.Release, Kernels: []target.Kernel{k.Kernel},
	})
	return err
}
