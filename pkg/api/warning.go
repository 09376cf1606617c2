package api

import (
	"context"
	"net/http"
	"time"

	"github.com/prebake/prebake/pkg/target"
)

// Warning is a cell whose builds fail, and that an early-warning entry of a wish list asked for.
type Warning struct {
	Kernel target.Kernel `json:"kernel"`
	Driver target.Driver `json:"driver"`
	// Class is the class of the failure, such as api-break. Error is the first line of its message.
	Class string `json:"class"`
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
	// Build is the number of the last failed build; its log has the details.
	Build int64 `json:"build"`
	// Since is the time of the first failure. LastSeenAt is the time of the last failure.
	Since      time.Time `json:"since"`
	LastSeenAt time.Time `json:"lastSeenAt"`
}

// Warnings lists the failing cells of early-warning entries, newest kernels first.
func (c *Client) Warnings(ctx context.Context) ([]Warning, error) {
	var out []Warning
	return out, c.call(ctx, http.MethodGet, "/v1/warnings", nil, &out)
}
