package agent_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
)

// farm stands in for the server. It gives these answers in order, and then repeats the last one.
type farm struct {
	answers []func() (resolve.Answer, error)
	asked   atomic.Int64
}

func (f *farm) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	i := int(f.asked.Add(1)) - 1
	return f.answers[min(i, len(f.answers)-1)]()
}

// compiler stands in for a compiler on the node. After some time, it returns an artifact that the test has published,
// or an error.
type compiler struct {
	takes  time.Duration
	answer resolve.Answer
	err    error
	// late means that the compiler returns the artifact although its context has ended.
	late    bool
	started atomic.Bool
	stopped atomic.Bool
	ended   atomic.Bool
	held    atomic.Bool // whether the run still keeps other fetchers from compiling
}

func (c *compiler) Build(ctx context.Context, _ resolve.Question) (resolve.Answer, func() error, error) {
	built := func(err error) (resolve.Answer, func() error, error) {
		if err != nil {
			return resolve.Answer{}, nil, err
		}
		c.held.Store(true)
		return c.answer, func() error { c.held.Store(false); return nil }, nil
	}
	c.started.Store(true)
	defer c.ended.Store(true)
	select {
	case <-ctx.Done():
		c.stopped.Store(true)
		if c.late {
			return built(nil)
		}
		return built(context.Cause(ctx))
	case <-time.After(c.takes):
		return built(c.err)
	}
}

// TestRace checks a node that compiles a driver itself while it waits for the server. Each row says whose driver the
// node must install, and whether it must stop its compile.
func TestRace(t *testing.T) {
	t.Parallel()
	theirs, own := testkit.NewKey(t), testkit.NewKey(t)
	published, here := layout(t), layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p, l := sample.Publish(t, published, theirs, c), sample.Publish(t, here, own, c)
	is := func(state api.State) func() (resolve.Answer, error) {
		return func() (resolve.Answer, error) {
			return resolve.Answer{State: state, Source: resolve.SourceServer, Build: 7}, nil
		}
	}
	has := func(repository, digest string) func() (resolve.Answer, error) {
		return func() (resolve.Answer, error) {
			return resolve.Answer{
				State:      api.Published,
				Source:     resolve.SourceServer,
				Driver:     c.Driver,
				Repository: repository,
				Digest:     digest,
			}, nil
		}
	}
	away := func() (resolve.Answer, error) {
		return resolve.Answer{}, fault.New(fault.Transient, "nobody answers", "")
	}
	local := resolve.Answer{
		State:      api.Published,
		Source:     resolve.SourceNode,
		Driver:     c.Driver,
		Repository: here,
		Digest:     l.Digest,
	}
	fails := fault.New(fault.APIBreak, "it does not compile", "take another")
	type answers = []func() (resolve.Answer, error)
	rows := []struct {
		name    string
		farm    answers
		compile compiler
		wait    time.Duration
		from    resolve.Source // the source of the installed artifact; "" means that none is installed
		kind    fault.Kind
		words   string
		stopped bool
	}{
		{
			"the farm is first",
			answers{is(api.Queued), is(api.Building), has(published, p.Digest)},
			compiler{takes: time.Hour, answer: local},
			10 * time.Minute,
			resolve.SourceServer,
			0,
			"",
			true,
		},
		{
			"this node is first",
			answers{is(api.Building)},
			compiler{takes: time.Minute, answer: local},
			10 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"nobody will make it",
			answers{is(api.Unknown)},
			compiler{takes: time.Hour, answer: local},
			10 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"the farm gives up",
			answers{is(api.Building), is(api.Failed)},
			compiler{takes: time.Hour, answer: local},
			10 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"it does not compile here",
			answers{is(api.Queued), is(api.Building), is(api.Building), has(published, p.Digest)},
			compiler{err: fails},
			10 * time.Minute,
			resolve.SourceServer,
			0,
			"",
			false,
		},
		{
			"the farm is away",
			answers{away},
			compiler{takes: time.Minute, answer: local},
			10 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"the farm is away, and a registry sends wrong bytes",
			answers{func() (resolve.Answer, error) {
				wrong := resolve.OtherService(fault.New(fault.Unverified, "wrong bytes", ""), "check it")
				absent := fault.New(fault.Transient, "nobody answers", "")
				return resolve.Chain{finder{err: absent}, finder{err: wrong}}.Find(t.Context(), resolve.Question{})
			}},
			compiler{takes: time.Minute, answer: local},
			10 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"it comes back",
			answers{away, away, has(published, p.Digest)},
			compiler{takes: time.Hour, answer: local},
			10 * time.Minute,
			resolve.SourceServer,
			0,
			"",
			false,
		},
		{
			"it comes back, and has none",
			answers{away, away, is(api.Failed)},
			compiler{takes: time.Minute, answer: local},
			20 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"away, and no time to wait",
			answers{away},
			compiler{answer: local},
			0,
			"",
			fault.Transient,
			"nobody answers",
			false,
		},
		{
			"building, and no time to wait",
			answers{is(api.Building)},
			compiler{takes: time.Minute, answer: local},
			0,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"artifact of the farm not verified",
			answers{is(api.Building), has(here, l.Digest)},
			compiler{takes: time.Hour, answer: local},
			10 * time.Minute,
			resolve.SourceNode,
			0,
			"",
			false,
		},
		{
			"yanked meanwhile",
			answers{is(api.Building), is(api.Building), is(api.Yanked)},
			compiler{takes: time.Hour, answer: local},
			10 * time.Minute,
			"",
			fault.NoArtifact,
			"yanked",
			true,
		},
		{
			"yanked while the compile ends",
			answers{is(api.Building), is(api.Building), is(api.Yanked)},
			compiler{takes: time.Hour, answer: local, late: true},
			10 * time.Minute,
			"",
			fault.NoArtifact,
			"yanked",
			true,
		},
		{
			"a registry that breaks while it is verified",
			answers{is(api.Building), has("127.0.0.1:1/x", p.Digest), has(published, p.Digest)},
			compiler{err: fails},
			10 * time.Minute,
			resolve.SourceServer,
			0,
			"",
			false,
		},
		{
			"neither",
			answers{is(api.Building), is(api.Failed)},
			compiler{takes: time.Minute, err: fails},
			10 * time.Minute,
			"",
			fault.APIBreak,
			"the farm also gave no driver: resolve driver: failed",
			false,
		},
		{
			"the time is over",
			answers{is(api.Building)},
			compiler{takes: time.Hour, err: fails},
			time.Minute,
			"",
			fault.APIBreak,
			"the farm also gave no driver: resolve driver: building",
			false,
		},
	}
	for i := range rows {
		row := &rows[i]
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newNode(t, c, 1, theirs)
				n.cfg.Wait = row.wait
				n.parts.Finder, n.parts.Local = &farm{answers: row.farm}, &row.compile
				n.parts.NodeVerifier = func() (agent.Verifier, error) { return own.Verifier(t), nil }
				r, err := n.runAs(t)
				if row.words == "yanked" && r.Answer.State != api.Yanked {
					t.Errorf("Run answers %s; want yanked", r.Answer.State)
				}
				if row.from == "" {
					if !fault.Is(err, row.kind) || !strings.Contains(err.Error(), row.words) {
						t.Errorf("Run = %v; want %v with %q", err, row.kind, row.words)
					}
				} else if err != nil || r.Answer.Source != row.from {
					t.Errorf("Run = %+v, %v; want it from %s", r.Answer, err, row.from)
				}
				if got := row.compile.stopped.Load(); got != row.stopped {
					t.Errorf("the compile was stopped: %v; want %v", got, row.stopped)
				}
				if row.compile.started.Load() != row.compile.ended.Load() {
					t.Error("the compile still runs after the end of the run")
				}
				if row.compile.held.Load() {
					t.Error("no other fetcher may compile after the end of the run")
				}
			})
		})
	}
}

// TestRaceEndsByTheAgentsClock checks that Parts.Now decides when the wait for the server ends. This clock jumps by an
// hour when the server names an artifact in a repository that cannot be reached.
func TestRaceEndsByTheAgentsClock(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	ref := layout(t)
	c := sample.NewCell(t, buildA, newVersion)
	p := sample.Publish(t, ref, key, c)
	synctest.Test(t, func(t *testing.T) {
		var ahead atomic.Int64
		offer := func(repository string, jump time.Duration) func() (resolve.Answer, error) {
			return func() (resolve.Answer, error) {
				ahead.Add(int64(jump))
				return resolve.Answer{State: api.Published, Source: resolve.SourceServer, Driver: c.Driver,
					Repository: repository, Digest: p.Digest}, nil
			}
		}
		building := func() (resolve.Answer, error) {
			return resolve.Answer{State: api.Building, Source: resolve.SourceServer}, nil
		}
		n := newNode(t, c, 1, key)
		n.cfg.Wait = 10 * time.Minute
		n.parts.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		n.parts.Finder = &farm{answers: []func() (resolve.Answer, error){
			building, offer("127.0.0.1:1/x", time.Hour), offer(ref, 0),
		}}
		n.parts.Local = &compiler{err: fault.New(fault.APIBreak, "it does not compile", "take another")}
		if r, err := n.runAs(t); !fault.Is(err, fault.APIBreak) || !strings.Contains(err.Error(), "also gave no driver") {
			t.Errorf("Run = %+v, %v; want the end of the wait", r.Answer, err)
		}
	})
}
