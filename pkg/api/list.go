package api

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"regexp"
	"strconv"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds of a list that comes in pages: entries of one, kernels of a page of cells,
// and pages.
const (
	pageLimit = 1000
	cellLimit = 100
	maxPages  = 10000
)

// Filter says which entries of a list are wanted. Empty fields are any. A list refuses
// fields that it does not know, as the API's description says.
type Filter struct {
	BuildID, Board string
	Milestone      int
	// GKE is a version of GKE, or how one begins, such as 1.33; of kernels and cells only.
	GKE string
	// Driver is an exact version.
	Driver  string
	Flavour string
	State   State
	// Actor is who called, in the audit log.
	Actor string
	// Page is how many entries are read at a time; 0 means as many as the server gives. Of
	// cells, kernels are counted.
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

// nextLink is the one form in which servers name the next page.
var nextLink = regexp.MustCompile(`^<(/v1/[^>]*)>; rel="next"$`)

// each reads a list page by page, as far as it is wanted. An error ends it.
func each[T any](ctx context.Context, c *Client, path string, query url.Values) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		at := path + "?" + query.Encode()
		for range maxPages {
			var page []T
			header, err := c.answer(ctx, http.MethodGet, at, nil, &page)
			if err != nil {
				yield(none, err)
				return
			}
			for _, entry := range page {
				if !yield(entry, nil) {
					return
				}
			}
			next := nextLink.FindStringSubmatch(header.Get("Link"))
			if next == nil {
				return
			}
			at = next[1]
		}
		yield(none, fault.Errorf(fault.TooLarge, "GET %s%s: the list has more than %d pages", c.base, path, maxPages))
	}
}

// collect reads a list to its end.
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

// EachKernel reads kernels, newest first; the filter may name build, board and milestone.
func (c *Client) EachKernel(ctx context.Context, f Filter) iter.Seq2[Kernel, error] {
	return each[Kernel](ctx, c, "/v1/kernels", f.query(pageLimit))
}

// EachDriver reads driver versions, newest first.
func (c *Client) EachDriver(ctx context.Context, f Filter) iter.Seq2[DriverRelease, error] {
	return each[DriverRelease](ctx, c, "/v1/drivers", f.query(pageLimit))
}

// EachArtifact reads artifacts, newest first; the filter may name all but the milestone.
func (c *Client) EachArtifact(ctx context.Context, f Filter) iter.Seq2[Artifact, error] {
	return each[Artifact](ctx, c, "/v1/artifacts", f.query(pageLimit))
}

// EachBuild reads builds, newest first; the filter may name all of it.
func (c *Client) EachBuild(ctx context.Context, f Filter) iter.Seq2[Build, error] {
	return each[Build](ctx, c, "/v1/builds", f.query(pageLimit))
}

// EachCell reads the states of cells, those of the newest kernel first; the filter may
// name build, board, milestone and driver.
func (c *Client) EachCell(ctx context.Context, f Filter) iter.Seq2[Resolution, error] {
	return each[Resolution](ctx, c, "/v1/cells", f.query(cellLimit))
}

// EachQuarantine reads the artifacts in quarantine, newest first.
func (c *Client) EachQuarantine(ctx context.Context, f Filter) iter.Seq2[Quarantine, error] {
	return each[Quarantine](ctx, c, "/v1/quarantine", f.query(pageLimit))
}

// EachAudit reads who changed what, newest first; the filter may name the actor.
func (c *Client) EachAudit(ctx context.Context, f Filter) iter.Seq2[AuditEntry, error] {
	return each[AuditEntry](ctx, c, "/v1/audit", f.query(pageLimit))
}

// Artifact reads one artifact.
func (c *Client) Artifact(ctx context.Context, digest string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodGet, "/v1/artifacts/"+url.PathEscape(digest), nil, &out)
}

// ReadyTimes tells how long cells took from their kernel's being seen until they were
// ready, of those that became so within the last days.
func (c *Client) ReadyTimes(ctx context.Context, days int) (ReadyDuration, error) {
	var out ReadyDuration
	return out, c.call(ctx, http.MethodGet, "/v1/ready-times?days="+strconv.Itoa(days), nil, &out)
}

// ReportsOf counts what nodes said of an artifact, or of the artifacts of a COS build and
// a board; what is empty is any.
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
