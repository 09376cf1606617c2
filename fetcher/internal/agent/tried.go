package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"io/fs"
	"strings"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// tried hands out what happened to a set that was loaded, where somebody wants to know.
// What says nothing of the driver is not told: a node without a GPU, or one whose fabric
// is still starting.
func (a *Agent) tried(what string, set *install.Set, verdict string, why error) {
	if a.parts.Tried == nil || a.cfg.NoLoad || verdict == string(gpucheck.Starting) || fault.Is(why, fault.NoDevice) {
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

// firstLine cuts a text to what one line of a table holds.
func firstLine(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	return strings.ToValidUTF8(text[:min(len(text), 500)], "")
}

// nodeID is the same in each boot of this node, and tells nobody which one it is; "" where
// the node has no machine id.
func (a *Agent) nodeID() string {
	raw, err := fs.ReadFile(a.node, "etc/machine-id")
	id := strings.TrimSpace(string(raw))
	if err != nil || id == "" {
		return ""
	}
	// The id itself is not for others to know, says machine-id(5): what derives from it is.
	sum := sha256.Sum256([]byte("prebake node report\n" + id))
	return hex.EncodeToString(sum[:])
}
