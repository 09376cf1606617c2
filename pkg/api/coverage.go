package api

import (
	"context"
	"net/http"
	"time"
)

// Coverage tells how many of the cells that wish lists want are published.
type Coverage struct {
	// At is the time of the count, which may be some seconds ago.
	At    time.Time      `json:"at"`
	Total CoverageCounts `json:"total"`
	// Milestones has one entry for each COS milestone, newest first. The entry 0 counts kernels whose milestone is not
	// known yet.
	Milestones []MilestoneCoverage `json:"milestones"`
}

// MilestoneCoverage counts the wanted cells of one milestone.
type MilestoneCoverage struct {
	Milestone int `json:"milestone"`
	CoverageCounts
}

// CoverageCounts counts wanted cells by their state. Wanted is the sum of all other fields.
type CoverageCounts struct {
	Wanted    int `json:"wanted"`
	Published int `json:"published"`
	Building  int `json:"building"`
	Queued    int `json:"queued"`
	Failed    int `json:"failed"`
	// Withdrawn cells have an artifact that is yanked or in quarantine.
	Withdrawn int `json:"withdrawn"`
	// Unsupported cells can never be built, as a builder has found out.
	Unsupported int `json:"unsupported"`
	// Missing cells are neither built nor queued, or their build was cancelled.
	Missing int `json:"missing"`
}

// Coverage reads how many of the cells that wish lists want are published.
func (c *Client) Coverage(ctx context.Context) (Coverage, error) {
	var out Coverage
	return out, c.call(ctx, http.MethodGet, "/v1/coverage", nil, &out)
}
