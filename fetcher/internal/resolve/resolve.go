// Package resolve finds the artifact that a node should run. It asks a server first, and then registries. The answer is
// not trusted: the caller must verify the artifact.
package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
)

// Auto means the open modules if they drive every GPU of the node, and otherwise the proprietary ones.
const Auto = "auto"

// Question says which node wants which driver.
type Question struct {
	Kernel target.Kernel
	Wish   target.Wish
	// Pin is the digest of the only wanted artifact, or "" for any that matches the wish.
	Pin string
	// Flavour is auto, proprietary or open.
	Flavour string
	// GPUs are the node's GPUs; flavour auto uses them.
	GPUs []gpulist.GPU
}

// Source is where an answer comes from.
type Source string

// These are the sources of answers.
const (
	SourceServer   Source = "server"
	SourceRegistry Source = "registry"
	// SourceNode is this node, which compiled the driver itself.
	SourceNode Source = "local"
	// SourceInstalled is the install folder; no server and no registry was asked.
	SourceInstalled Source = "installed"
	// SourceNone means that no source is configured.
	SourceNone Source = "nobody"
)

// Answer has an artifact, or the reason why there is none.
type Answer struct {
	State api.State `json:"state"`
	// Driver has the version and the flavour as far as the source knows them.
	Driver target.Driver `json:"driver"`
	// Repository is a reference that the registry client opens.
	Repository string `json:"repository,omitempty"`
	Digest     string `json:"digest,omitempty"`
	Source     Source `json:"source"`
	Reason     string `json:"reason,omitempty"`
	Hint       string `json:"hint,omitempty"`
	// Build is the newest build of the cell; 0 means none.
	Build int64 `json:"build,omitempty"`
	// Missing is the build to request from the farm if no artifact fits this node. It is nil if one fits, or if the farm
	// cannot build it.
	Missing *api.BuildRequest `json:"-"`
}

// Pending reports whether a build is on its way.
func (a Answer) Pending() bool { return a.State == api.Building || a.State == api.Queued }

// Err returns the reason for a missing artifact as a fault. If there is an artifact, it returns nil.
func (a Answer) Err() error {
	text := fmt.Sprintf("resolve driver: %s", a.State)
	if a.Reason != "" {
		text += ": " + a.Reason
	}
	hint := a.Hint
	switch a.State {
	case api.Published:
		return nil
	case api.Unsupported:
		return fault.New(fault.Unsupported, text, hint)
	case api.Yanked, api.Quarantined:
		if hint == "" {
			hint = "ask for another version with --driver"
		}
	case api.Building, api.Queued:
		if hint == "" {
			hint = "wait for the build with --wait-build 15m, or compile on this node with --builder PATH"
		}
	default:
		if hint == "" {
			hint = "compile on this node with --builder PATH, or ask the farm for a build: POST /v1/builds"
		}
	}
	return fault.New(fault.NoArtifact, text, hint)
}

type client interface {
	Resolve(ctx context.Context, q api.Question) (api.Resolution, error)
	Base() string
}

// Server is a [Finder] that asks a Prebake server.
type Server struct {
	Client client
	// Request asks the server for a build. A [Chain] calls it if no source has the artifact and no build exists. If it is
	// nil, the node asks for no build.
	Request func(ctx context.Context, r api.BuildRequest) (api.Build, error)
	// GPUs returns the list of supported GPUs. If it is nil, no list is read.
	GPUs Lister
}

// Find asks the server for the artifact. With flavour auto, it asks again for the proprietary flavour if the open
// modules do not drive the node's GPUs. A digest is an error of kind Usage.
func (s Server) Find(ctx context.Context, q Question) (Answer, error) {
	if q.Pin != "" {
		return Answer{}, fault.New(fault.Usage, "ask server: a server finds no artifact by its digest",
			"set the artifact's repository: --registry HOST/NAME")
	}
	auto := q.Flavour == Auto
	q = q.narrowFlavour()
	a, err := s.ask(ctx, q)
	if err != nil || a.State != api.Published || !auto || len(q.GPUs) == 0 {
		return a, err
	}
	unfit, err := s.unsupported(ctx, q, a)
	if err != nil || unfit == nil {
		return a, err
	}
	if a.Driver.Flavour == target.Open {
		q.Flavour, q.Wish = string(target.Proprietary), target.Wish(a.Driver.Version)
		other, err := s.ask(ctx, q)
		if err != nil { // the driver tells a chain what to ask its other sources for
			return Answer{Source: SourceServer, Driver: target.Driver{Version: a.Driver.Version,
				Flavour: target.Proprietary}}, err
		}
		if other.Pending() {
			return other, nil
		}
		if other.Missing != nil {
			other.Reason = unfit.Error()
			return other, nil
		}
		if other.State == api.Published {
			if unfit, err = s.unsupported(ctx, q, other); err != nil || unfit == nil {
				return other, err
			}
		}
	}
	return unfitAnswer(a, unfit), nil
}

// unsupported returns the reason why an artifact does not drive the node's GPUs, or nil.
func (s Server) unsupported(ctx context.Context, q Question, a Answer) (unfit, err error) {
	list, err := s.GPUs.list(ctx, a, q.Kernel)
	if err != nil {
		return nil, err
	}
	_, unfit = gpulist.Choose(q.GPUs, []gpulist.Offer{{Flavour: a.Driver.Flavour, List: list}})
	return unfit, nil
}

func (s Server) ask(ctx context.Context, q Question) (Answer, error) {
	r, err := s.Client.Resolve(ctx, api.Question{
		BuildID: q.Kernel.BuildID, Board: q.Kernel.Board, Driver: string(q.Wish), Flavour: q.Flavour,
		Release: q.Kernel.Release,
	})
	if err != nil {
		return Answer{}, fmt.Errorf("ask the server for a driver: %w", err)
	}
	a := Answer{State: r.State, Driver: r.Driver, Digest: r.Digest, Source: SourceServer, Reason: r.Reason, Hint: r.Hint}
	if r.Build != nil {
		a.Build = r.Build.ID
		if a.Reason == "" && r.State == api.Failed {
			a.Reason = fmt.Sprintf("build %d: %s: %s", r.Build.ID, r.Build.Class, r.Build.Error)
		}
	}
	if a.State == api.Unknown && s.Request != nil {
		a.Missing = &api.BuildRequest{
			BuildID: q.Kernel.BuildID,
			Board:   q.Kernel.Board,
			Driver:  string(q.Wish),
			Flavour: q.Flavour,
		}
	}
	if a.State != api.Published {
		return a, nil
	}
	if a.Repository, err = addHost(s.Client.Base(), r.Repository); err != nil {
		return Answer{}, err
	}
	return a, check(a, q)
}

// request asks the farm for a build and writes the result into the answer. It returns an error only if ctx has ended or
// the error is passing (see [Passing]). It adds any other error to the answer's reason.
func (s Server) request(ctx context.Context, a *Answer) error {
	b, err := s.Request(ctx, *a.Missing)
	switch {
	case ctx.Err() != nil || Passing(err):
		return fmt.Errorf("ask for a build: %w", err)
	case err != nil:
		a.Reason = strings.TrimPrefix(a.Reason+"; the request of a build failed: "+err.Error(), "; ")
		if a.Hint == "" {
			a.Hint = fault.Hint(err)
		}
	case b.State == api.Queued || b.State == api.Building:
		a.State, a.Build, a.Driver = b.State, b.ID, b.Driver
		a.Reason = "this node asked for the build"
	}
	return nil
}

// addHost adds the server's host to a repository name that begins with a slash. Other names stay.
func addHost(base, repository string) (string, error) {
	if repository == "" {
		return "", fault.New(fault.Transient,
			"ask the server for a driver: the response does not say in which repository the artifact is",
			"update the server")
	}
	path, ok := strings.CutPrefix(repository, "/")
	if !ok {
		return repository, nil
	}
	u, err := url.Parse(base)
	if err != nil || u.Host == "" {
		return "", fault.New(
			fault.Usage,
			fmt.Sprintf("server %q: want a URL with a host", base),
			"set the server's URL, as in --server http://127.0.0.1:8440",
		)
	}
	return u.Host + "/" + path, nil
}

// check compares the answer with the question, because the signed statements are fetched only later.
func check(a Answer, q Question) error {
	mismatch := func(what, got, want string) error {
		return fault.New(
			fault.Mismatch,
			fmt.Sprintf("ask the server for a driver: the response is for another %s: want %s; the server answered for %s", what,
				want, got),
			"check that --server is the URL of the right server",
		)
	}
	if _, err := target.ParseFingerprint(a.Digest); err != nil { // a digest has the same format
		return fault.New(
			fault.Unverified,
			fmt.Sprintf("ask the server for a driver: digest %.80q: want sha256: and 64 hex digits", a.Digest),
			"check that --server is the URL of the right server",
		)
	}
	if _, err := target.ParseDriver(a.Driver.Version, string(a.Driver.Flavour)); err != nil {
		return fault.Wrap(fault.Mismatch, fmt.Errorf("ask the server for a driver: %w", err), "update the server")
	}
	if v, exact := q.Wish.Exact(); exact && v != a.Driver.Version {
		return mismatch("driver", a.Driver.Version, v)
	}
	wish, _ := q.Wish.GPU()
	if b, named := wish.BranchName(); named && b != a.Driver.Branch() {
		return mismatch("branch", a.Driver.Branch(), b)
	}
	if q.Flavour != Auto && q.Flavour != string(a.Driver.Flavour) {
		return mismatch("flavour", string(a.Driver.Flavour), q.Flavour)
	}
	return nil
}

// Registry is a [Finder] that looks up the tags of a COS build in a registry.
type Registry struct {
	// Ref is the reference of the repository.
	Ref string
	// Resolve returns the digest of a tag, or an error of kind NoArtifact.
	Resolve func(ctx context.Context, tag string) (digest string, err error)
	// Tags lists all tags; nil where the registry cannot list them.
	Tags func(ctx context.Context) ([]string, error)
	// Driver returns the driver in an artifact's manifest, or an error of kind NoArtifact.
	Driver func(ctx context.Context, digest string) (target.Driver, error)
	// GPUs returns the list of supported GPUs. If it is nil, no list is read.
	GPUs Lister
}

// Find looks up the tags of this COS build. A wish for the default driver, or for a GPU type, is an error of kind
// Usage, because tags name neither.
func (r Registry) Find(ctx context.Context, q Question) (Answer, error) {
	if q.Pin != "" {
		return r.findDigest(ctx, q.Pin)
	}
	if version, exact := q.Wish.Exact(); exact {
		return r.findVersion(ctx, q, version)
	}
	if _, gpu := q.Wish.GPU(); gpu != "" {
		return Answer{}, fault.New(fault.Usage,
			fmt.Sprintf("driver %q: a registry alone cannot resolve it: a registry has no lists of GPU types", q.Wish),
			"ask a server: --server URL; or set a version, a branch or latest, without a GPU type; or compile on this node, "+
				"which reads COS's lists: --builder PROGRAM without --registry")
	}
	branch, named := q.Wish.BranchName()
	if (!named && q.Wish != target.Latest) || r.Tags == nil {
		return Answer{}, fault.New(fault.Usage, fmt.Sprintf(
			"resolve driver %q: a registry alone does not say which version this is", q.Wish),
			"set a version, a branch or latest, as in --driver 535.261.03, or a server: --server URL")
	}
	tags, err := r.Tags(ctx)
	if err != nil {
		return Answer{}, fmt.Errorf("ask the registry for a driver: %w", err)
	}
	var versions []string
	prefix := strings.TrimSuffix(bundle.KernelTag(q.Kernel, target.Driver{}), target.Driver{}.String())
	for _, tag := range tags {
		name, ok := strings.CutPrefix(tag, prefix)
		i := strings.LastIndex(name, "-")
		if !ok || i < 0 {
			continue
		}
		d, err := target.ParseDriver(name[:i], name[i+1:])
		// An edition, such as GRID, must be wished for by its full version.
		if err == nil && d == d.Modules() && (!named || d.Branch() == branch) && !slices.Contains(versions, d.Version) {
			versions = append(versions, d.Version)
		}
	}
	slices.SortFunc(versions, func(x, y string) int { return target.CompareVersions(y, x) })
	answer := Answer{
		State:  api.Unknown,
		Source: SourceRegistry,
		Reason: fmt.Sprintf("%s has no tag that begins with %s, for %s", r.Ref, prefix, q.Wish),
	}
	for _, version := range versions {
		if answer, err = r.findVersion(ctx, q, version); err != nil || answer.State == api.Published {
			return answer, err
		}
	}
	return answer, nil
}

// findDigest looks up the artifact with this digest. The answer's driver is unverified; it comes from the manifest.
func (r Registry) findDigest(ctx context.Context, digest string) (Answer, error) {
	d, err := r.Driver(ctx, digest)
	if fault.Is(err, fault.NoArtifact) {
		return Answer{
			State:  api.Unknown,
			Source: SourceRegistry,
			Reason: fmt.Sprintf("%s does not have %s", r.Ref, digest),
		}, nil
	}
	if err != nil {
		return Answer{}, fmt.Errorf("ask the registry for a driver: %w", err)
	}
	return Answer{State: api.Published, Source: SourceRegistry, Driver: d, Repository: r.Ref, Digest: digest}, nil
}

// findVersion looks up the tag of a version. With flavour auto, it prefers the open flavour, as COS does, if this
// flavour drives the node's GPUs. If findVersion cannot read the list of GPUs of an artifact, it returns the artifact
// with the error. If it cannot read the tag of the only driver that may still fit, it returns this driver with the
// error.
func (r Registry) findVersion(ctx context.Context, q Question, version string) (Answer, error) {
	flavours, gpus := []target.Flavour{target.Flavour(q.Flavour)}, q.GPUs
	if q.Flavour == Auto {
		flavours = []target.Flavour{target.Open, target.Proprietary}
	} else {
		gpus = nil // a node that asks for one flavour gets it, whatever its GPUs are
	}
	unknown := Answer{
		State:  api.Unknown,
		Source: SourceRegistry,
		Driver: target.Driver{Version: version, Flavour: flavours[len(flavours)-1]},
	}
	var answers []Answer
	var offers []gpulist.Offer
	var unfit error
	for _, f := range flavours {
		d := target.Driver{Version: version, Flavour: f}
		tag := bundle.KernelTag(q.Kernel, d)
		digest, err := r.Resolve(ctx, tag)
		if fault.Is(err, fault.NoArtifact) {
			unknown.Reason = fmt.Sprintf("%s has no tag %s", r.Ref, tag)
			continue
		}
		if err != nil {
			var a Answer
			if unfit != nil {
				a.Driver = d
			}
			return a, fmt.Errorf("ask the registry for a driver: %w", err)
		}
		a := Answer{State: api.Published, Source: SourceRegistry, Driver: d, Repository: r.Ref, Digest: digest}
		o := gpulist.Offer{Flavour: f}
		if len(gpus) > 0 {
			if o.List, err = r.GPUs.list(ctx, a, q.Kernel); err != nil {
				return a, err
			}
		}
		answers, offers = append(answers, a), append(offers, o)
		i, err := gpulist.Choose(gpus, offers)
		if err == nil {
			return answers[i], nil // no need to ask for the other flavour
		}
		unfit = err
	}
	if unfit != nil {
		return unfitAnswer(answers[0], unfit), nil
	}
	return unknown, nil
}

// NoSource is the finder of nodes without server and registry. It never finds an artifact.
type NoSource struct{}

// Find implements [Finder]. Its answer always has the state Unknown.
func (NoSource) Find(context.Context, Question) (Answer, error) {
	return Answer{State: api.Unknown, Source: SourceNone, Reason: "neither a server nor a registry is configured"}, nil
}

// Finder is one way to find an artifact.
type Finder interface {
	Find(ctx context.Context, q Question) (Answer, error)
}

// WaitLimits are the limits of the wait for a build or for a service that fails.
type WaitLimits struct {
	// Wait is the longest total time; 0 means to ask once.
	Wait time.Duration
	// Pauses are the pauses between two questions; nil means those of the function [Pauses].
	Pauses backoff.BackOff
	// Progress receives a text about the current wait; it may be nil.
	Progress func(text string)
}

// Find asks the finder f until the answer is final or the time is over. A running build and a passing error (see
// [Passing]) are not final. Find returns the last answer and error.
func (p WaitLimits) Find(ctx context.Context, f Finder, q Question) (Answer, error) {
	if p.Pauses == nil {
		p.Pauses = Pauses()
	}
	over := time.After(p.Wait)
	for {
		a, err := f.Find(ctx, q)
		if err == nil && !a.Pending() || err != nil && !Passing(err) {
			return a, err
		}
		if p.Progress != nil {
			switch {
			case err != nil:
				p.Progress(err.Error())
			case a.Build != 0:
				p.Progress(fmt.Sprintf("build %d is %s", a.Build, a.State))
			default:
				p.Progress(string(a.State))
			}
		}
		select {
		case <-ctx.Done():
			return a, errors.Join(context.Cause(ctx), err)
		case <-over:
			return a, err
		case <-time.After(nextPause(p.Pauses, err)):
		}
	}
}
