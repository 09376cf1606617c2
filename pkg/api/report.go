package api

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/prebake/prebake/pkg/target"
)

// Outcome is what happened to an artifact on a node.
type Outcome string

// The outcomes.
const (
	Loaded   Outcome = "loaded"    // the driver serves the node
	NotLoad  Outcome = "failed"    // it does not, and the node has no driver
	FellBack Outcome = "fell-back" // it does not, and the node uses the one before
)

// NodeReport is what a node says of an artifact that it tried.
type NodeReport struct {
	BuildID string        `json:"buildId"`
	Board   string        `json:"board"`
	Driver  target.Driver `json:"driver"`
	Digest  string        `json:"digest"`
	Outcome Outcome       `json:"outcome" enum:"loaded,failed,fell-back"`
	// Class is the fault's kind unless the outcome is Loaded, and Message its first line.
	Class   string `json:"class,omitempty"`
	Message string `json:"message,omitempty"`
	// Node is the same in each report of a node, and tells nobody which one it is: 32 to
	// 64 lower-case hex digits, such as a hash of its machine id.
	Node string `json:"node"`
}

// ReportCounts tells on how many nodes an artifact had which outcome on one kernel, by
// the last report of each within thirty days.
type ReportCounts struct {
	BuildID  string    `json:"buildId"`
	Board    string    `json:"board"`
	Digest   string    `json:"digest"`
	Loaded   int       `json:"loaded"`
	Failed   int       `json:"failed"`
	FellBack int       `json:"fellBack"`
	LastAt   time.Time `json:"lastAt"`
}

// Quarantine is an artifact that did not load on several nodes, and what nodes say of it.
type Quarantine struct {
	Artifact Artifact       `json:"artifact"`
	Reports  []ReportCounts `json:"reports"`
}

// Report tells what happened to an artifact on this node.
func (c *Client) Report(ctx context.Context, r NodeReport) error {
	return c.sendOnly(ctx, http.MethodPost, "/v1/reports", r)
}

// Reports counts what nodes said of an artifact.
func (c *Client) Reports(ctx context.Context, digest string) ([]ReportCounts, error) {
	return c.ReportsOf(ctx, digest, "", "")
}

// Quarantine lists the artifacts in quarantine, newest first.
func (c *Client) Quarantine(ctx context.Context) ([]Quarantine, error) {
	return collect(c.EachQuarantine(ctx, Filter{}))
}

// Lift makes an artifact in quarantine usable again.
func (c *Client) Lift(ctx context.Context, digest string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts/"+url.PathEscape(digest)+"/lift", nil, &out)
}
