package api

import (
	"context"
	"net/http"
	"time"

	"github.com/prebake/prebake/pkg/target"
)

// Warning is a break that an early-warning entry of a wish list found: a cell, mostly of
// a milestone that is not released yet, whose builds fail.
type Warning struct {
	Kernel target.Kernel `json:"kernel"`
	Driver target.Driver `json:"driver"`
	// Class is how it failed, such as api-break, and Error the first line that says where.
	Class string `json:"class"`
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
	// Build is the last one that failed; its log says more.
	Build int64 `json:"build"`
	// Since is when it failed first, and LastSeenAt when it failed last.
	Since      time.Time `json:"since"`
	LastSeenAt time.Time `json:"lastSeenAt"`
}

// Warnings lists the breaks that early-warning entries found, newest kernels first.
func (c *Client) Warnings(ctx context.Context) ([]Warning, error) {
	var out []Warning
	return out, c.call(ctx, http.MethodGet, "/v1/warnings", nil, &out)
}
