package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"time"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Explanation has the finding of each trust rule about an artifact, for one COS build.
type Explanation struct {
	Digest   string          `json:"digest"`
	Driver   target.Driver   `json:"driver"`
	Kernel   target.Kernel   `json:"kernel"`
	Findings []trust.Finding `json:"findings"`
	// Verdict is null if a rule refuses the artifact.
	Verdict *trust.Verdict `json:"verdict"`
}

// explainer is a verifier that returns the finding of each trust rule.
type explainer interface {
	Explain(bundles [][]byte, e trust.Expect) (*trust.Verdict, []trust.Finding, error)
}

// Observe reads the node's facts.
func (a *Agent) Observe() (*host.Facts, error) { return host.Observe(a.node) }

// Explain returns the finding of each trust rule about an artifact, without reading a layer. The kernel needs at least
// its BUILD_ID and board. The error says why a node would refuse the artifact. If the artifact cannot be read, the
// explanation is nil.
func (a *Agent) Explain(ctx context.Context, repo Repository, digest string, kernel target.Kernel,
	now time.Time) (*Explanation, error) {
	p, err := readEvidence(ctx, repo, a.parts.Verifier, digest, &host.Facts{Kernel: kernel})
	if err != nil {
		return nil, err
	}
	a.refresh(ctx)
	return a.explain(p, a.parts.Verifier, digest, kernel, now)
}

func (a *Agent) explain(p evidence, v Verifier, digest string, kernel target.Kernel, now time.Time) (*Explanation,
	error) {
	content, err := bundle.ParseManifest(p.Manifest, p.Config)
	if err != nil {
		return nil, err
	}
	by, ok := v.(explainer)
	if !ok {
		return nil, fault.New(fault.Internal, "explain verification: this verifier gives no findings", "")
	}
	e := &Explanation{Digest: digest, Driver: content.Identity.Driver, Kernel: kernel}
	e.Verdict, e.Findings, err = by.Explain(p.Bundles,
		trust.Expect{Digest: digest, Kernel: kernel, Driver: content.Identity.Driver, Identity: content.Identity, Now: now})
	return e, err
}

// ExplainInstalled returns the finding of each trust rule about the active driver. It also compares the driver's files
// with the signed content.
func (a *Agent) ExplainInstalled(ctx context.Context) (_ *Explanation, err error) {
	facts, err := a.Observe()
	if err != nil {
		return nil, err
	}
	store, err := a.openInstalled()
	if err != nil {
		return nil, nothingInstalled(err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	set, err := store.Current()
	if err != nil {
		return nil, err
	}
	if set == nil {
		return nil, nothingInstalled(fs.ErrNotExist)
	}
	raw, err := store.Evidence(set.Digest)
	if err != nil {
		return nil, err
	}
	var p evidence
	if raw == nil || json.Unmarshal(raw, &p) != nil || digestOf(p.Manifest) != set.Digest {
		return nil, fault.New(fault.Unverified,
			"verify installed driver: the driver's attestations are missing, or belong to another artifact", hintAgain)
	}
	v, err := a.verifierFor(set.Origin)
	if err != nil {
		return nil, err
	}
	e, err := a.explain(p, v, set.Digest, facts.Kernel, time.Time{})
	if e == nil {
		return nil, err
	}
	a.forget()
	_, damaged := a.verifySet(ctx, store, set, facts)
	f := trust.Finding{Rule: "files", OK: damaged == nil, Detail: "all layers are what was signed"}
	if damaged != nil {
		f.Detail = damaged.Error()
	}
	e.Findings = append(e.Findings, f)
	return e, firstOf(err, damaged)
}
