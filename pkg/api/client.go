package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds of what the client reads. A list of every build of a large farm is a
// few MiB; a build's log is bounded by the server.
const (
	maxAnswer  = 64 << 20
	maxProblem = 1 << 20
)

// Client calls a server. It is safe for concurrent use.
type Client struct {
	base  string
	token string
	http  *http.Client
}

// NewClient returns a client of the server at base, such as
// http://127.0.0.1:8440. The token may be empty for reading. A nil hc means a
// client with a timeout of one minute for a whole call.
func NewClient(base, token string, hc *http.Client) *Client {
	if hc == nil {
		hc = &http.Client{Timeout: time.Minute}
	}
	return &Client{base: strings.TrimRight(base, "/"), token: token, http: hc}
}

// Base returns the server's address without a slash at the end.
func (c *Client) Base() string { return c.base }

// Kernels lists the kernels of the catalogue.
func (c *Client) Kernels(ctx context.Context) ([]Kernel, error) {
	var out []Kernel
	return out, c.call(ctx, http.MethodGet, "/v1/kernels", nil, &out)
}

// Drivers lists the driver versions of the catalogue.
func (c *Client) Drivers(ctx context.Context) ([]DriverRelease, error) {
	var out []DriverRelease
	return out, c.call(ctx, http.MethodGet, "/v1/drivers", nil, &out)
}

// Artifacts lists the artifacts, yanked ones included.
func (c *Client) Artifacts(ctx context.Context) ([]Artifact, error) {
	var out []Artifact
	return out, c.call(ctx, http.MethodGet, "/v1/artifacts", nil, &out)
}

// Question is what Resolve asks. Flavour is auto, proprietary or open; an
// empty Driver means default, an empty Flavour auto. Release is the node's own
// `uname -r`; the server uses it only to refuse.
type Question struct {
	BuildID, Board, Driver, Flavour, Release string
}

// Resolve asks what a node of this kernel should run. A valid question always
// has an answer; what the answer's State says is not an error.
func (c *Client) Resolve(ctx context.Context, q Question) (Resolution, error) {
	values := url.Values{"buildId": {q.BuildID}, "board": {q.Board}}
	for name, value := range map[string]string{"driver": q.Driver, "flavour": q.Flavour, "release": q.Release} {
		if value != "" {
			values.Set(name, value)
		}
	}
	var out Resolution
	return out, c.call(ctx, http.MethodGet, "/v1/resolve?"+values.Encode(), nil, &out)
}

// RequestBuild asks for a cell; it returns the open build of that cell if there
// is one, or the finished one if it is published.
func (c *Client) RequestBuild(ctx context.Context, r BuildRequest) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodPost, "/v1/builds", r, &out)
}

// Builds lists builds, newest first; state "" is all.
func (c *Client) Builds(ctx context.Context, state State) ([]Build, error) {
	path := "/v1/builds"
	if state != "" {
		path += "?" + url.Values{"state": {string(state)}}.Encode()
	}
	var out []Build
	return out, c.call(ctx, http.MethodGet, path, nil, &out)
}

// Build reads one build.
func (c *Client) Build(ctx context.Context, id int64) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodGet, buildPath(id), nil, &out)
}

// UpdateBuild reports a builder's progress and returns the build as it is now.
func (c *Client) UpdateBuild(ctx context.Context, id int64, u BuildUpdate) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodPatch, buildPath(id), u, &out)
}

// BuildLog opens a build's log. The caller closes it.
func (c *Client) BuildLog(ctx context.Context, id int64) (io.ReadCloser, error) {
	resp, err := c.do(ctx, http.MethodGet, buildPath(id)+"/log", "", nil)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// PutBuildLog stores a build's log in place of the one that is there.
func (c *Client) PutBuildLog(ctx context.Context, id int64, log io.Reader) error {
	resp, err := c.do(ctx, http.MethodPut, buildPath(id)+"/log", "text/plain; charset=utf-8", log)
	if err != nil {
		return err
	}
	return drain(resp)
}

// AddArtifact tells the catalogue of an artifact that was published.
func (c *Client) AddArtifact(ctx context.Context, a Artifact) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts", a, &out)
}

// Yank marks an artifact as one that must not be used any more.
func (c *Client) Yank(ctx context.Context, digest, reason string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts/"+url.PathEscape(digest)+"/yank", YankRequest{Reason: reason}, &out)
}

// Unyank takes a yank back.
func (c *Client) Unyank(ctx context.Context, digest string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts/"+url.PathEscape(digest)+"/unyank", nil, &out)
}

// YankRequest is the body of a yank.
type YankRequest struct {
	Reason string `json:"reason"`
}

func buildPath(id int64) string { return "/v1/builds/" + strconv.FormatInt(id, 10) }

// call sends in as JSON, if any, and decodes the answer into out.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	var contentType string
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body, contentType = bytes.NewReader(raw), "application/json"
	}
	resp, err := c.do(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return errors.Join(fault.Wrap(fault.Transient, fmt.Errorf("%s %s%s: read answer: %w", method, c.base, path, err), ""), resp.Body.Close())
	}
	return drain(resp)
}

// drain reads what is left so that the connection can be used again.
func drain(resp *http.Response) error {
	_, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxProblem))
	return errors.Join(err, resp.Body.Close())
}

// do sends a request and returns the answer if it is a success.
func (c *Client) do(ctx context.Context, method, path, contentType string, body io.Reader) (*http.Response, error) {
	fail := func(err error) error { return fmt.Errorf("%s %s%s: %w", method, c.base, path, err) }
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fail(err), "give the server as a URL such as http://127.0.0.1:8440")
	}
	req.Header.Set("Accept", "application/json, text/plain;q=0.9, application/problem+json")
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fail(context.Cause(ctx))
		}
		return nil, fault.Wrap(fault.Transient, fail(err), "check that the server runs at "+c.base)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	return nil, errors.Join(problem(resp, fail), resp.Body.Close())
}

// problem turns an error answer back into a classified error. Answers that are
// not ours (a proxy's page) are classified by status alone, and say where they
// came from.
func problem(resp *http.Response, fail func(error) error) error {
	var p Problem
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	isOurs := err == nil && strings.HasPrefix(resp.Header.Get("Content-Type"), "application/problem+json") &&
		json.Unmarshal(raw, &p) == nil && p.Status == resp.StatusCode
	if isOurs {
		text := p.Detail
		if text == "" {
			text = p.Title
		}
		return fault.New(p.Kind, text, p.Hint)
	}
	kind, hint := fault.Internal, ""
	switch {
	case resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden:
		kind, hint = fault.Usage, "give the server's token"
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500:
		kind = fault.Transient
	case resp.StatusCode >= 400:
		kind = fault.Usage
	}
	return fault.Wrap(kind, fail(errors.New("the server answered "+resp.Status)), hint)
}
