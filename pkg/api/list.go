package api

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/page"
)

// Bounds on a list that the client reads page by page. A page has at most pageLimit entries, or the cells of at most
// cellLimit kernels. A list has at most maxPages pages.
const (
	pageLimit = 1000
	cellLimit = 100
	maxPages  = 10000
)

// Filter selects entries of a list. An empty field matches any entry. Each method of [Client] says which fields it
// supports.
type Filter struct {
	BuildID, Board string
	Milestone      int
	// GKE is a GKE version, or the beginning of one, such as 1.33.
	GKE string
	// Driver is an exact version.
	Driver  string
	Flavour string
	State   State
	// Actor is the caller in an entry of the audit log.
	Actor string
	// Page is the number of entries that one request reads; 0 means the server's maximum. For lists of cells, it is the
	// number of kernels.
	Page int
}

func (f Filter) query(largest int) url.Values {
	query := url.Values{}
	for name, value := range map[string]string{"buildId": f.BuildID, "board": f.Board, "driver": f.Driver,
		"flavour": f.Flavour, "state": string(f.State), "actor": f.Actor, "gke": f.GKE} {
		if value != "" {
			query.Set(name, value)
		}
	}
	if f.Milestone > 0 {
		query.Set("milestone", strconv.Itoa(f.Milestone))
	}
	page := f.Page
	if page < 1 || page > largest {
		page = largest
	}
	query.Set("limit", strconv.Itoa(page))
	return query
}

// readPages reads a list page by page. After an error, it yields the error and stops.
func readPages[T any](ctx context.Context, c *Client, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		at := path + "?" + query.Encode()
		for range maxPages {
			var entries []T
			header, err := c.answer(ctx, http.MethodGet, at, nil, &entries)
			if err != nil {
				yield(none, err)
				return
			}
			for _, entry := range entries {
				if !yield(entry, nil) {
					return
				}
			}
			// The link has only a path, because the server does not know the address under which clients reach it.
			next, err := page.Next(&url.URL{Path: path}, header, func(url string) bool { return url == at })
			if err != nil {
				yield(none, fault.Wrap(fault.Transient, fmt.Errorf("GET %s%s: read the next page: %w", c.base, path, err),
					"configure the proxy in front of the server so that it sends the server's Link header as it is"))
				return
			}
			if next == nil {
				return
			}
			at = next.String()
		}
		yield(none, fault.Errorf(fault.TooLarge, "GET %s%s: the list has more than %d pages", c.base, path, maxPages))
	}
}

func collect[T any](entries iter.Seq2[T, error]) ([]T, error) {
	all := []T{}
	for entry, err := range entries {
		if err != nil {
			return nil, err
		}
		all = append(all, entry)
	}
	return all, nil
}

// EachKernel reads kernels, newest first. The filter may set BUILD_ID, board, milestone and GKE version.
func (c *Client) EachKernel(ctx context.Context, f Filter) iter.Seq2[Kernel, error] {
	return readPages[Kernel](ctx, c, "/v1/kernels", f.query(pageLimit))
}

// EachDriver reads driver versions, newest first. The filter may set only the page size.
func (c *Client) EachDriver(ctx context.Context, f Filter) iter.Seq2[DriverRelease, error] {
	return readPages[DriverRelease](ctx, c, "/v1/drivers", f.query(pageLimit))
}

// EachArtifact reads artifacts, newest first. The filter may set BUILD_ID, board, driver, flavour and state.
func (c *Client) EachArtifact(ctx context.Context, f Filter) iter.Seq2[Artifact, error] {
	return readPages[Artifact](ctx, c, "/v1/artifacts", f.query(pageLimit))
}

// EachBuild reads builds, newest first. The filter may set BUILD_ID, board, milestone, driver, flavour and state.
func (c *Client) EachBuild(ctx context.Context, f Filter) iter.Seq2[Build, error] {
	return readPages[Build](ctx, c, "/v1/builds", f.query(pageLimit))
}

// EachCell reads the states of cells. The cells of the newest kernel come first. The filter may set BUILD_ID, board,
// milestone, GKE version, driver and state.
func (c *Client) EachCell(ctx context.Context, f Filter) iter.Seq2[Resolution, error] {
	return readPages[Resolution](ctx, c, "/v1/cells", f.query(cellLimit))
}

// EachQuarantine reads the artifacts in quarantine, newest first. The filter may set only the page size.
func (c *Client) EachQuarantine(ctx context.Context, f Filter) iter.Seq2[Quarantine, error] {
	return readPages[Quarantine](ctx, c, "/v1/quarantine", f.query(pageLimit))
}

// EachAudit reads the audit log, newest first. The filter may set the actor.
func (c *Client) EachAudit(ctx context.Context, f Filter) iter.Seq2[AuditEntry, error] {
	return readPages[AuditEntry](ctx, c, "/v1/audit", f.query(pageLimit))
}

// Artifact reads one artifact.
func (c *Client) Artifact(ctx context.Context, digest string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodGet, "/v1/artifacts/"+url.PathEscape(digest), nil, &out)
}

// ReadyTimes summarises how long cells took to become ready after the discovery of their kernel. The summary covers the
// cells that became ready in the given number of past days.
func (c *Client) ReadyTimes(ctx context.Context, days int) (ReadyDuration, error) {
	var out ReadyDuration
	return out, c.call(ctx, http.MethodGet, "/v1/ready-times?days="+strconv.Itoa(days), nil, &out)
}

// ReportsOf returns the counts of the nodes' reports. Each argument that is not empty selects only the reports with
// this digest, BUILD_ID or board.
func (c *Client) ReportsOf(ctx context.Context, digest, buildID, board string) ([]ReportCounts, error) {
	query := url.Values{}
	for name, value := range map[string]string{"digest": digest, "buildId": buildID, "board": board} {
		if value != "" {
			query.Set(name, value)
		}
	}
	var out []ReportCounts
	return out, c.call(ctx, http.MethodGet, "/v1/reports?"+query.Encode(), nil, &out)
}
