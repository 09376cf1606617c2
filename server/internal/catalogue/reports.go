package catalogue

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/store"
)

// Nodes report what happened to an artifact. An artifact goes into quarantine, until an operator has examined it, if
// two things are true: within reportWindow, it failed on several nodes, and within keepReports, it failed on more nodes
// than it loaded on. Nodes may lie, so the failures of one network (/24, or /64 with IPv6) are not enough if a
// quarantine needs two nodes or more. The successes of one network are limited, too, but less: a whole fleet may have
// one address, and a false alarm costs more than a late one.

// reporter reads and removes the reports of nodes.
type reporter interface {
	Reports(ctx context.Context, digest, buildID, board string, limit int) ([]api.ReportCounts, error)
	ForgetReports(ctx context.Context, before time.Time) error
}

const (
	keepReports = 30 * 24 * time.Hour
	// reportWindow is the period in which an artifact must fail on several nodes for a quarantine.
	reportWindow = 24 * time.Hour
	// For one network, loadedFactor times as many nodes can count for a success as for a failure.
	loadedFactor = 10
	// maxCounts is the maximum number of entries that [Catalogue.Reports] returns.
	maxCounts = 1000
	// maxMessage is the maximum length of a node's message, in bytes.
	maxMessage = 500
)

var nodePattern = regexp.MustCompile(`^[0-9a-f]{32,64}$`)

// Network returns the network of a node's address: the first 24 bits with IPv4, or the first 64 with IPv6.
func Network(a netip.Addr) string {
	if !a.IsValid() {
		return "unknown"
	}
	a = a.Unmap().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 24
	}
	return netip.PrefixFrom(a, bits).Masked().String()
}

// Report records a node's report about an artifact. from is the node's [Network].
func (c *Catalogue) Report(ctx context.Context, r api.NodeReport, from string) error {
	if err := checkReport(&r); err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("record the report: %w", err), "")
	}
	a, err := c.Store.Artifact(ctx, r.Digest)
	if err != nil {
		return err
	}
	isFor := slices.ContainsFunc(
		a.Kernels,
		func(k target.Kernel) bool { return k.BuildID == r.BuildID && k.Board == r.Board },
	)
	if a.Driver != r.Driver || !isFor {
		return fault.New(fault.Mismatch,
			fmt.Sprintf("record the report: artifact %s is not driver %s for COS build %s and board %s",
				r.Digest, r.Driver, r.BuildID, r.Board), "")
	}
	reason, now := "", c.Now()
	err = c.Store.Write(ctx, func(tx *store.Tx) error {
		if err := tx.PutReport(ctx, r, from, now, now.Add(-reportWindow)); err != nil {
			return err
		}
		if r.Outcome == api.Loaded || c.Quarantine <= 0 {
			return nil
		}
		if a, err = tx.Artifact(ctx, r.Digest); err != nil || a.State != api.Published {
			return err
		}
		said, err := tx.OutcomeCounts(ctx, r.Digest, now.Add(-keepReports), now.Add(-reportWindow))
		if err != nil {
			return err
		}
		if reason = quarantineReason(said, c.Quarantine); reason == "" {
			return nil
		}
		if r.Message != "" {
			reason += "; the last report says: " + r.Message
		}
		return tx.SetArtifactState(ctx, r.Digest, api.Quarantined, reason, c.Now())
	})
	if err == nil && reason != "" {
		c.Log.WarnContext(ctx, "artifact in quarantine", "digest", r.Digest, "driver", r.Driver.String(), "reason", reason)
	}
	return err
}

func checkReport(r *api.NodeReport) error {
	if _, err := target.ParseKernel(r.BuildID, r.Board); err != nil {
		return err
	}
	if _, err := target.ParseDriver(r.Driver.Version, string(r.Driver.Flavour)); err != nil {
		return err
	}
	if !digestPattern.MatchString(r.Digest) {
		return badDigest(r.Digest)
	}
	if !nodePattern.MatchString(r.Node) {
		return fmt.Errorf("node %.80q: want 32 to 64 lower-case hex digits", r.Node)
	}
	switch r.Outcome {
	case api.Loaded:
		r.Class, r.Message = "", ""
		return nil
	case api.NotLoad, api.FellBack:
	default:
		return fmt.Errorf("outcome %.80q: want loaded, failed or fell-back", r.Outcome)
	}
	if err := CheckClass(r.Class); err != nil {
		return err
	}
	r.Message = firstLine(r.Message)
	if len(r.Message) > maxMessage {
		r.Message = firstLine(r.Message[:maxMessage]) + "..."
	}
	return checkLine("message", r.Message)
}

// artifactFaults are the classes of failures that may be the artifact's fault. Other classes are the node's, such as a
// full disk.
var artifactFaults = []fault.Kind{fault.Rejected, fault.Mismatch, fault.Internal, fault.TimedOut}

// mayBlame reports whether a failure may be the artifact's fault. If this server does not know the class, mayBlame
// returns false. A GPU that the driver cannot use is usually broken, so this failure is not the artifact's fault. After
// a fallback it may be: a node falls back for this failure only if its former driver could use the GPU.
func mayBlame(s store.OutcomeCount) bool {
	kind, err := fault.Parse(s.Class)
	return err == nil && (slices.Contains(artifactFaults, kind) || kind == fault.Unusable && s.Outcome == api.FellBack)
}

// quarantineReason returns why an artifact has to go into quarantine, or "". The artifact must have failed on at least
// limit nodes recently, and in all counted reports on more nodes than it loaded on.
func quarantineReason(outcomes []store.OutcomeCount, limit int) string {
	type nodes struct{ recent, failed, loaded int }
	of := map[string]nodes{}
	for _, s := range outcomes {
		n := of[s.Source]
		switch {
		case s.Outcome == api.Loaded:
			n.loaded += s.Nodes
		case mayBlame(s):
			n.failed += s.Nodes
			n.recent += s.Recent
		}
		of[s.Source] = n
	}
	most := max(1, limit-1) // the most failed nodes of one network that count
	var sum nodes
	for _, n := range of {
		sum.recent += min(n.recent, most)
		sum.failed += min(n.failed, most)
		sum.loaded += min(n.loaded, loadedFactor*most)
	}
	if sum.recent < limit || sum.failed <= sum.loaded {
		return ""
	}
	return fmt.Sprintf("the artifact did not load on %d counted nodes within a day, and on %d of %d within 30 days",
		sum.recent,
		sum.failed, sum.failed+sum.loaded)
}

// Reports counts the reported outcomes for one artifact, or for all artifacts of one kernel.
func (c *Catalogue) Reports(ctx context.Context, digest, buildID, board string) ([]api.ReportCounts, error) {
	switch {
	case digest == "" && buildID == "":
		return nil, fault.New(fault.Usage, "count the reports: no artifact and no COS build is given",
			"add digest=DIGEST to the query for one artifact, or buildId=BUILD_ID for all artifacts of a COS build")
	case digest != "" && !digestPattern.MatchString(digest):
		return nil, badDigest(digest)
	}
	return c.Store.Reports(ctx, digest, buildID, board, maxCounts)
}

// maxQuarantine is the maximum number of artifacts on a page of quarantined artifacts. Each costs an SQL statement.
const maxQuarantine = 100

// Quarantined lists a page of the quarantined artifacts, newest first.
func (c *Catalogue) Quarantined(ctx context.Context, p store.Page) (all []api.Quarantine, next string, err error) {
	if p, err = checkPage(p); err != nil {
		return nil, "", err
	}
	p.Limit = min(p.Limit, maxQuarantine)
	artifacts, next, err := c.Store.Artifacts(ctx, store.ArtifactFilter{State: api.Quarantined}, p)
	if err != nil {
		return nil, "", err
	}
	all = []api.Quarantine{}
	for _, a := range artifacts {
		counts, err := c.Store.Reports(ctx, a.Digest, "", "", maxCounts)
		if err != nil {
			return nil, "", err
		}
		all = append(all, api.Quarantine{Artifact: a, Reports: counts})
	}
	return all, next, nil
}
