package api

import (
	"context"
	"iter"
	"time"
)

// ReleaseSummary is a COS build with the number of its cells in each state.
type ReleaseSummary struct {
	BuildID string `json:"buildId"`
	// Milestone is 0 if it is not known yet.
	Milestone int       `json:"milestone,omitempty"`
	Boards    []string  `json:"boards"`
	SeenAt    time.Time `json:"seenAt"`
	// Cells has, for each state, the number of cells that somebody asked for.
	Cells map[State]int `json:"cells"`
	// Times says how long the cells took to become ready after their kernel's discovery.
	Times ReadyDuration `json:"times"`
}

// EachRelease reads COS builds, newest first. The filter may set board and milestone. Its page size counts kernels: a
// COS build has one kernel for each board.
func (c *Client) EachRelease(ctx context.Context, f Filter) iter.Seq2[ReleaseSummary, error] {
	return readPages[ReleaseSummary](ctx, c, "/v1/releases", f.query(cellLimit))
}
