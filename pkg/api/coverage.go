package api

import (
	"context"
	"net/http"
	"time"
)

// Coverage tells how much of what wish lists want is there.
type Coverage struct {
	// At is when it was counted, some seconds ago.
	At    time.Time      `json:"at"`
	Total CoverageCounts `json:"total"`
	// Milestones are the COS milestones, newest first; 0 means of kernels whose milestone
	// is not known yet.
	Milestones []MilestoneCoverage `json:"milestones"`
}

// MilestoneCoverage counts the wanted cells of one milestone.
type MilestoneCoverage struct {
	Milestone int `json:"milestone"`
	CoverageCounts
}

// CoverageCounts counts wanted cells. Wanted is the sum of all others.
type CoverageCounts struct {
	Wanted    int `json:"wanted"`
	Published int `json:"published"`
	Building  int `json:"building"`
	Queued    int `json:"queued"`
	Failed    int `json:"failed"`
	// Withdrawn cells have an artifact that is yanked or in quarantine.
	Withdrawn int `json:"withdrawn"`
	// Unsupported cells can never be built: a builder found out.
	Unsupported int `json:"unsupported"`
	// Missing cells are neither built nor queued, or were called off.
	Missing int `json:"missing"`
}

// Coverage reads how much of what wish lists want is there.
func (c *Client) Coverage(ctx context.Context) (Coverage, error) {
	var out Coverage
	return out, c.call(ctx, http.MethodGet, "/v1/coverage", nil, &out)
}
