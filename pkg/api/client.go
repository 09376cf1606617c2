package api

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-cleanhttp"

	"github.com/prebake/prebake/pkg/fault"
)

// Maximum sizes of the responses that the client reads, in bytes. The server itself bounds the log of a build; see
// [MaxBuildLog].
const (
	maxAnswer  = 64 << 20 // of a JSON response
	maxProblem = 1 << 20  // of an error response, and of one event
)

// Client calls a server. It is safe for concurrent use. An error has the kind that the server's response names. If the
// server cannot be reached, the error is of kind Transient.
type Client struct {
	base  string
	token func() (string, error)
	http  *http.Client
}

// Time limits. The transfer of a log has no total limit, but fails if no data moves for idleTimeout.
const (
	callTime    = time.Minute // of a call whose response is JSON
	idleTimeout = time.Minute
)

// NewClient returns a client of the server at base, such as http://127.0.0.1:8440. The token may be empty if the caller
// only reads. If hc is nil, the client waits at most one minute for a response to begin.
func NewClient(base, token string, hc *http.Client) *Client {
	if hc == nil {
		transport := cleanhttp.DefaultPooledTransport()
		transport.ResponseHeaderTimeout = idleTimeout // starts when the request's body has been sent
		hc = &http.Client{Transport: transport}
	}
	return &Client{base: strings.TrimRight(base, "/"), token: func() (string, error) { return token, nil }, http: hc}
}

// maxToken is the maximum size of a token in bytes. A token of Kubernetes has about 1,500 bytes.
const maxToken = 64 << 10

// ReadToken reads a token from a file, without surrounding white space. If the file cannot be opened or has no token,
// the error is of kind Usage.
func ReadToken(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fault.Wrap(
			fault.Usage,
			fmt.Errorf("read token: %w", err),
			"give --token-file a readable file with the token",
		)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxToken))
	if err = errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("read token %s: %w", file, err)
	}
	token := strings.TrimSpace(string(raw))
	if token == "" {
		return "", fault.New(fault.Usage, "read token: "+file+" is empty", "write the server's token into this file")
	}
	return token, nil
}

// WithTokenFile returns a client that reads its token from a file at each call, so the token may be renewed.
func (c *Client) WithTokenFile(file string) *Client {
	return &Client{base: c.base, http: c.http, token: func() (string, error) { return ReadToken(file) }}
}

// Base returns the server's address without a slash at the end.
func (c *Client) Base() string { return c.base }

// Kernels lists all kernels of the catalogue, newest first.
func (c *Client) Kernels(ctx context.Context) ([]Kernel, error) {
	return collect(c.EachKernel(ctx, Filter{}))
}

// Drivers lists all driver versions of the catalogue, newest first.
func (c *Client) Drivers(ctx context.Context) ([]DriverRelease, error) {
	return collect(c.EachDriver(ctx, Filter{}))
}

// Artifacts lists all artifacts, yanked ones included, newest first.
func (c *Client) Artifacts(ctx context.Context) ([]Artifact, error) {
	return collect(c.EachArtifact(ctx, Filter{}))
}

// Question is the input of [Client.Resolve]. Driver and Flavour are as in a [BuildRequest]; "" means default and auto.
// Release is what `uname -r` prints on the node. If the catalogue has another release for the kernel, the resolution
// has no artifact.
type Question struct {
	BuildID, Board, Driver, Flavour, Release string
}

// Resolve returns the artifact that a node with this kernel should run. A State other than published is not an error.
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

// RequestBuild requests a build of a cell. If the cell has a build that is queued, running or published, RequestBuild
// returns that build, and the server starts no other.
func (c *Client) RequestBuild(ctx context.Context, r BuildRequest) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodPost, "/v1/builds", r, &out)
}

// Builds lists the builds in this state, newest first. An empty state means any state.
func (c *Client) Builds(ctx context.Context, state State) ([]Build, error) {
	return collect(c.EachBuild(ctx, Filter{State: state}))
}

// Cancel cancels a build.
func (c *Client) Cancel(ctx context.Context, id int64) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodPost, buildPath(id)+"/cancel", nil, &out)
}

// Build reads one build.
func (c *Client) Build(ctx context.Context, id int64) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodGet, buildPath(id), nil, &out)
}

// UpdateBuild reports a builder's progress. It returns the build after the update.
func (c *Client) UpdateBuild(ctx context.Context, id int64, u BuildUpdate) (Build, error) {
	var out Build
	return out, c.call(ctx, http.MethodPatch, buildPath(id), u, &out)
}

// Watch passes each new state of a build to the callback, until the build is over or the callback returns an error. If
// the stream breaks, the error is of kind Transient, and the caller may call Watch again. Watch is a function for the
// same reason as [FollowLog].
func Watch(ctx context.Context, c *Client, id int64, f func(Build) error) error {
	path := buildPath(id) + "/events"
	resp, err := c.request(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxProblem)
	over := false
	for !over && lines.Scan() {
		data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: "))
		if !ok {
			continue // an event name, a comment, or the end of an event
		}
		var b Build
		if err := json.Unmarshal(data, &b); err != nil {
			return fmt.Errorf("GET %s%s: read event: %w", c.base, path, err)
		}
		if err := f(b); err != nil {
			return err
		}
		over = b.State != Queued && b.State != Building
	}
	if over {
		return nil
	}
	err = cmp.Or(lines.Err(), io.ErrUnexpectedEOF)
	return fault.Wrap(fault.Transient, fmt.Errorf("GET %s%s: read events: %w", c.base, path, err), "run the command again")
}

// AddArtifact adds a published artifact to the catalogue.
func (c *Client) AddArtifact(ctx context.Context, a NewArtifact) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts", a, &out)
}

// ForgetArtifact removes a published artifact from the catalogue. The server refuses the removal if its registry still
// has the artifact.
func (c *Client) ForgetArtifact(ctx context.Context, digest string) error {
	return c.sendOnly(ctx, http.MethodDelete, "/v1/artifacts/"+url.PathEscape(digest), nil)
}

// Yank marks an artifact so that no node gets it any more.
func (c *Client) Yank(ctx context.Context, digest string, r YankRequest) (Artifact, error) {
	var out Artifact
	return out, c.call(
		ctx,
		http.MethodPost,
		"/v1/artifacts/"+url.PathEscape(digest)+"/yank",
		r,
		&out,
	)
}

// Unyank undoes a yank: nodes may get the artifact again.
func (c *Client) Unyank(ctx context.Context, digest string) (Artifact, error) {
	var out Artifact
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts/"+url.PathEscape(digest)+"/unyank", nil, &out)
}

// FreeTags makes the server accept other content under the tags of an artifact that was deleted from its registry.
func (c *Client) FreeTags(ctx context.Context, digest string) (FreedTags, error) {
	var out FreedTags
	return out, c.call(ctx, http.MethodPost, "/v1/artifacts/"+url.PathEscape(digest)+"/free-tags", nil, &out)
}

// WishLists lists all wish lists.
func (c *Client) WishLists(ctx context.Context) ([]WishList, error) {
	var out []WishList
	return out, c.call(ctx, http.MethodGet, "/v1/wish-lists", nil, &out)
}

func wishListPath(name string) string { return "/v1/wish-lists/" + url.PathEscape(name) }

// WishList reads one wish list.
func (c *Client) WishList(ctx context.Context, name string) (WishList, error) {
	var out WishList
	return out, c.call(ctx, http.MethodGet, wishListPath(name), nil, &out)
}

// PutWishList stores a wish list.
func (c *Client) PutWishList(ctx context.Context, name string, l NewWishList) (WishList, error) {
	var out WishList
	return out, c.call(ctx, http.MethodPut, wishListPath(name), l, &out)
}

// DropWishList removes a wish list.
func (c *Client) DropWishList(ctx context.Context, name string) error {
	return c.sendOnly(ctx, http.MethodDelete, wishListPath(name), nil)
}

// Announce tells the server that a COS build exists.
func (c *Client) Announce(ctx context.Context, buildID string) (Release, error) {
	var out Release
	return out, c.call(ctx, http.MethodPost, "/v1/releases", ReleaseNote{BuildID: buildID}, &out)
}

// Release reads a COS build and the states of its cells.
func (c *Client) Release(ctx context.Context, buildID string) (Release, error) {
	var out Release
	return out, c.call(ctx, http.MethodGet, "/v1/releases/"+url.PathEscape(buildID), nil, &out)
}

// Preflight reports whether node pools may move to other COS builds.
func (c *Client) Preflight(ctx context.Context, q PreflightRequest) (Preflight, error) {
	var out Preflight
	return out, c.call(ctx, http.MethodPost, "/v1/preflight", q, &out)
}

// YankRequest is the body of a request that yanks an artifact.
type YankRequest struct {
	Reason string `json:"reason"`
	// Replacement is the digest of another published artifact; "" means none. The replacement must have the yanked
	// artifact's fingerprint, and its driver or a newer one.
	Replacement string `json:"replacement,omitempty"`
}

// FreedTags are the tags that may get other content again, each with its repository: prebake/driver:TAG.
type FreedTags struct {
	Tags []string `json:"tags"`
}

func buildPath(id int64) string { return "/v1/builds/" + strconv.FormatInt(id, 10) }

// call sends the argument in as JSON, unless in is nil. It decodes the response into out.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	_, err := c.answer(ctx, method, path, in, out)
	return err
}

// answer is like call, and also returns the header of the response.
func (c *Client) answer(ctx context.Context, method, path string, in, out any) (http.Header, error) {
	ctx, cancel := context.WithTimeoutCause(
		ctx,
		callTime,
		fault.New(
			fault.Transient,
			"the server did not answer within "+callTime.String(),
			"check that the server runs at "+c.base,
		),
	)
	defer cancel()
	var body io.Reader
	var contentType string
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
		body, contentType = bytes.NewReader(raw), "application/json"
	}
	resp, err := c.request(ctx, method, path, contentType, body)
	if err != nil {
		return nil, err
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		kind, hint := fault.Transient, ""
		if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html") {
			kind, err = fault.WebPage, errors.New("a web page answered")
			hint = "open " + c.base + " in a browser on this network: if it is a login page, log in; if a proxy answers, add " +
				"the host to NO_PROXY; else correct the server's address"
		}
		return nil, errors.Join(
			fault.Wrap(kind, fmt.Errorf("%s %s%s: read the response: %w", method, c.base, path, err), hint),
			resp.Body.Close(),
		)
	}
	return resp.Header, drain(resp)
}

// sendOnly sends a request whose response has no body.
func (c *Client) sendOnly(ctx context.Context, method, path string, in any) error {
	var body io.Reader
	var contentType string
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body, contentType = bytes.NewReader(raw), "application/json"
	}
	resp, err := c.request(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	return drain(resp)
}

// drain reads the rest of the body and closes it, so that the connection can be used again.
func drain(resp *http.Response) error {
	_, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxProblem))
	return errors.Join(err, resp.Body.Close())
}

// request sends a request. A response with an error status becomes an error; for status 416, see send.
func (c *Client) request(ctx context.Context, method, path, contentType string, body io.Reader) (*http.Response,
	error) {
	header := http.Header{}
	if contentType != "" {
		header.Set("Content-Type", contentType)
	}
	return c.send(ctx, method, path, header, body)
}

// send is like request, and also sends the given headers. If one of them is Range, status 416 is not an error: a log
// that [FollowLog] reads may have become shorter.
func (c *Client) send(
	ctx context.Context,
	method, path string,
	header http.Header,
	body io.Reader,
) (*http.Response, error) {
	fail := func(err error) error { return fmt.Errorf("%s %s%s: %w", method, c.base, path, err) }
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, fail(err), "give the server as a URL such as http://127.0.0.1:8440")
	}
	req.Header = header
	req.Header.Set("Accept", "application/json, text/plain;q=0.9, application/problem+json")
	token, err := c.token()
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fail(context.Cause(ctx))
		}
		return nil, fault.Wrap(fault.Transient, fail(err), "check that the server runs at "+c.base)
	}
	outside := header.Get("Range") != "" && resp.StatusCode == http.StatusRequestedRangeNotSatisfiable
	if resp.StatusCode/100 == 2 || outside {
		return resp, nil
	}
	return nil, errors.Join(problem(resp, fail), resp.Body.Close())
}

// problem turns an error response into an error with a fault kind, which the response names. The HTTP status decides
// the kind if the response is not from the server but, for example, from a proxy, or if a newer server names a kind
// that this program does not know.
func problem(resp *http.Response, fail func(error) error) error {
	var p struct {
		Problem
		Kind string `json:"kind"` // hides the field Kind of Problem, which refuses unknown kinds
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	isOurs := err == nil && strings.HasPrefix(resp.Header.Get("Content-Type"), "application/problem+json") &&
		json.Unmarshal(raw, &p) == nil && p.Status == resp.StatusCode
	kind, hint := kindOf(resp.StatusCode)
	if !isOurs {
		return withRetryAfter(fault.Wrap(kind, fail(errors.New("the server answered "+resp.Status)), hint), resp)
	}
	if known, err := fault.Parse(p.Kind); err == nil {
		kind = known
	}
	text := p.Detail
	if text == "" {
		text = p.Title
	}
	return withRetryAfter(fault.New(kind, text, p.Hint), resp)
}

// kindOf returns the kind and the hint for an error response of which only the status is known.
func kindOf(status int) (kind fault.Kind, hint string) {
	switch {
	case status == http.StatusUnauthorized:
		return fault.Unauthorized, "give a file with a token of the server: --token-file FILE"
	case status == http.StatusForbidden:
		return fault.Forbidden, "give a file with a token that allows this call: --token-file FILE"
	case status == http.StatusTooManyRequests || status >= 500:
		return fault.Transient, ""
	case status >= 400:
		return fault.Usage, ""
	}
	return fault.Internal, ""
}
