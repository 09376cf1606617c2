package api

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/prebake/prebake/pkg/target"
)

// Outcome is the result of an artifact's activation on a node.
type Outcome string

// The outcomes of an activation.
const (
	Loaded   Outcome = "loaded"    // the driver is loaded and works
	NotLoad  Outcome = "failed"    // the driver does not work, and the node has no other driver
	FellBack Outcome = "fell-back" // the driver does not work, and the node uses its former driver again
)

// NodeReport is a node's report about an artifact that the node tried to activate.
type NodeReport struct {
	BuildID string        `json:"buildId"`
	Board   string        `json:"board"`
	Driver  target.Driver `json:"driver"`
	Digest  string        `json:"digest"`
	Outcome Outcome       `json:"outcome" enum:"loaded,failed,fell-back"`
	// Class is the kind of the error, and Message is its first line. Class and Message are empty if the outcome is
	// Loaded.
	Class   string `json:"class,omitempty"`
	Message string `json:"message,omitempty"`
	// Node identifies the node by 32 to 64 lower-case hex digits, such as a hash of the machine id. A node sends the same
	// text in each report. Nobody can tell from the text which node it is.
	Node string `json:"node"`
}

// ReportCounts has the number of nodes with each outcome, for an artifact on one kernel. Only each node's last report
// within thirty days counts.
type ReportCounts struct {
	BuildID  string    `json:"buildId"`
	Board    string    `json:"board"`
	Digest   string    `json:"digest"`
	Loaded   int       `json:"loaded"`
	Failed   int       `json:"failed"`
	FellBack int       `json:"fellBack"`
	LastAt   time.Time `json:"lastAt"`
}

// Quarantine is an artifact that did not load on several nodes. Reports are the counts of the nodes' reports.
type Quarantine struct {
	Artifact Artifact       `json:"artifact"`
	Reports  []ReportCounts `json:"reports"`
}

// Report sends a node's report about an artifact.
func (c *Client) Report(ctx context.Context, r NodeReport) error {
	return c.sendOnly(ctx, http.MethodPost, "/v1/reports", r)
}

// Reports returns the counts of the nodes' reports about an artifact.
func (c *Client) Reports(ctx context.Context, digest string) ([]ReportCounts, error) {
	return c.ReportsOf(ctx, digest, "", "")
}

// Quarantine lists the artifacts in quarantine, newest first.
func (c *Client) Quarantine(ctx context.Context) ([]Quarantine, error) {
	return collect(c.EachQuarantine(ctx, Filter{}))
}

// Lift ends the quarantine of an artifact, so that nodes may use it again.
func (c *Client) Lift(ctx context.Context, digest string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts/"+url.PathEscape(digest)+"/lift", nil, &out)
}
