package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"strings"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// reportTried sends the result of an activation to Parts.Tried. It skips results that say nothing about the driver: a
// node without a GPU, a GPU that needs a reset, or an NVLink fabric that still starts.
func (a *Agent) reportTried(what string, set *install.Set, verdict string, why error) {
	var p *gpucheck.Problem
	if a.parts.Tried == nil || a.cfg.NoLoad || verdict == string(gpucheck.Starting) || fault.Is(why, fault.NoDevice) ||
		errors.As(why, &p) && p.Verdict.OnlyReset {
		return
	}
	r := api.NodeReport{Driver: set.Driver, Digest: set.Digest, Outcome: api.Loaded, Node: a.nodeID()}
	switch {
	case what == eventReverted && verdict != "":
		r.Outcome = api.FellBack
	case what == eventReverted, what == eventInForce && why != nil:
		r.Outcome = api.NotLoad
	case what != eventInForce:
		return
	}
	if why != nil {
		r.Class, r.Message = fault.Of(why).String(), firstLine(why.Error())
	}
	facts, err := host.Observe(a.node)
	if err != nil || r.Node == "" {
		return
	}
	r.BuildID, r.Board = facts.Kernel.BuildID, facts.Kernel.Board
	a.parts.Tried(r)
}

// firstLine shortens a text to the first line and 500 bytes, for a table.
func firstLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	return strings.ToValidUTF8(text[:min(len(text), 500)], "")
}

// nodeID returns an id that stays the same across boots and does not reveal the node. It is "" without a machine id.
func (a *Agent) nodeID() string {
	raw, err := fs.ReadFile(a.node, "etc/machine-id")
	id := strings.TrimSpace(string(raw))
	if err != nil || id == "" {
		return ""
	}
	// machine-id(5) says that the id is confidential, and recommends to publish a hash instead.
	sum := sha256.Sum256([]byte("prebake node report\n" + id))
	return hex.EncodeToString(sum[:])
}
