package api

import (
	"context"
	"iter"
	"time"
)

// ReleaseSummary is a COS build with how far its cells are.
type ReleaseSummary struct {
	BuildID string `json:"buildId"`
	// Milestone is 0 as long as nobody knows it.
	Milestone int       `json:"milestone,omitempty"`
	Boards    []string  `json:"boards"`
	SeenAt    time.Time `json:"seenAt"`
	// Cells counts the cells that somebody asked for by state.
	Cells map[State]int `json:"cells"`
	// Times tells how long the cells took that are ready.
	Times ReadyDuration `json:"times"`
}

// EachRelease reads COS builds, newest first; the filter may name board and milestone. Of a
// page, kernels are counted: a COS build has one for each board.
func (c *Client) EachRelease(ctx context.Context, f Filter) iter.Seq2[ReleaseSummary, error] {
	return each[ReleaseSummary](ctx, c, "/v1/releases", f.query(cellLimit))
}
