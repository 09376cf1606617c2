package api

import (
	"context"
	"net/http"
	"time"
)

// Coverage says how many of the cells that wish lists ask for are published.
type Coverage struct {
	// At is the time of the count, which may be some seconds ago.
	At    time.Time      `json:"at"`
	Total CoverageCounts `json:"total"`
	// Milestones has one entry for each COS milestone, newest first. Milestone 0 has the kernels whose milestone is not
	// known.
	Milestones []MilestoneCoverage `json:"milestones"`
}

// MilestoneCoverage has the numbers of wanted cells of one milestone.
type MilestoneCoverage struct {
	Milestone int `json:"milestone"`
	CoverageCounts
}

// CoverageCounts has the number of wanted cells in each state. Wanted is the sum of all other fields.
type CoverageCounts struct {
	Wanted    int `json:"wanted"`
	Published int `json:"published"`
	Building  int `json:"building"`
	Queued    int `json:"queued"`
	Failed    int `json:"failed"`
	// Withdrawn is the number of cells whose artifact is yanked or in quarantine.
	Withdrawn int `json:"withdrawn"`
	// Unsupported is the number of cells that can never be built, according to a builder.
	Unsupported int `json:"unsupported"`
	// Missing is the number of cells that are neither built nor queued, or whose build was cancelled.
	Missing int `json:"missing"`
}

// Coverage returns how many of the cells that wish lists ask for are published.
func (c *Client) Coverage(ctx context.Context) (Coverage, error) {
	var out Coverage
	return out, c.call(ctx, http.MethodGet, "/v1/coverage", nil, &out)
}
