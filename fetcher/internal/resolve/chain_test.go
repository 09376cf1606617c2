package resolve_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// says is a finder that always gives the same answer, and counts the questions.
type says struct {
	state api.State
	err   error
	asked *int
}

func (s says) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	*s.asked++
	return resolve.Answer{State: s.state, Reason: string(s.state)}, s.err
}

func TestChain(t *testing.T) {
	t.Parallel()
	away, wrong, usage := fault.New(fault.Transient, "refused", ""), fault.New(fault.Mismatch, "another driver",
		""), fault.New(fault.Usage, "no default", "")
	often := fault.New(fault.TooMany, "asked too often", "")
	page := fault.New(fault.WebPage, "a web page", "log in")
	bytes := resolve.OtherService(fault.New(fault.Unverified, "wrong bytes", ""), "check it")
	type link struct {
		state api.State
		err   error
	}
	for name, row := range map[string]struct {
		links []link
		want  api.State
		kind  fault.Kind // Internal means no error
		asked int
	}{
		"the server has it": {[]link{{api.Published, nil}, {api.Published, nil}}, api.Published,
			fault.Internal, 1},
		"the server is away":            {[]link{{"", away}, {api.Published, nil}}, api.Published, fault.Internal, 2},
		"the server is asked too often": {[]link{{"", often}, {api.Published, nil}}, api.Published, fault.Internal, 2},
		"a web page, and a registry":    {[]link{{"", page}, {api.Published, nil}}, api.Published, fault.Internal, 2},
		"a web page, and nowhere else":  {[]link{{"", page}, {api.Unknown, nil}}, "", fault.WebPage, 2},
		"away, and a web page":          {[]link{{"", away}, {"", page}}, "", fault.WebPage, 2},
		"wrong bytes, and a registry":   {[]link{{"", bytes}, {api.Published, nil}}, api.Published, fault.Internal, 2},
		"wrong bytes everywhere":        {[]link{{"", bytes}, {"", bytes}}, "", fault.Unverified, 2},
		"away, and wrong bytes":         {[]link{{"", away}, {"", bytes}}, "", fault.Transient, 2},
		"wrong bytes, and nowhere else": {[]link{{api.Unknown, nil}, {"", bytes}}, "", fault.Transient, 2},
		"too often, and nowhere else":   {[]link{{"", often}, {api.Unknown, nil}}, "", fault.TooMany, 2},
		"the server's database is fresh": {[]link{{api.Unknown, nil}, {api.Published, nil}}, api.Published,
			fault.Internal, 2},
		"it is being built, and is there": {[]link{{api.Building, nil}, {api.Published, nil}}, api.Published,
			fault.Internal, 2},
		"it is being built, and nowhere else": {[]link{{api.Building, nil}, {api.Unknown, nil}}, api.Building,
			fault.Internal, 2},
		"quarantined is, too": {[]link{{api.Quarantined, nil}, {api.Published, nil}}, api.Quarantined,
			fault.Internal, 1},
		"yanked is yanked": {[]link{{api.Yanked, nil}, {api.Published, nil}}, api.Yanked, fault.Internal,
			1},
		"unsupported is nowhere": {[]link{{api.Unsupported, nil}, {api.Published, nil}}, api.Unsupported,
			fault.Internal, 1},
		"away, and not in the registry":        {[]link{{"", away}, {api.Unknown, nil}}, "", fault.Transient, 2},
		"away, and a registry has no default":  {[]link{{"", away}, {"", usage}}, "", fault.Transient, 2},
		"failed, and a registry has no answer": {[]link{{api.Failed, nil}, {"", usage}}, api.Failed, fault.Internal, 2},
		"a wrong answer is not passed over":    {[]link{{"", wrong}, {api.Published, nil}}, "", fault.Mismatch, 1},
		"registries alone, asked for default":  {[]link{{"", usage}, {"", usage}}, "", fault.Usage, 2},
		"an artifact, and its list of GPUs is away": {[]link{{api.Published, away}, {api.Published, nil}}, "",
			fault.Transient, 1},
		"an artifact, and its list of GPUs is denied": {[]link{{api.Published, usage}, {api.Published, nil}}, "",
			fault.Usage, 1},
		"a folder, then a registry": {[]link{{api.Unknown, nil}, {"", away}, {api.Published, nil}}, api.Published,
			fault.Internal, 3},
	} {
		var chain resolve.Chain
		asked := 0
		for _, l := range row.links {
			chain = append(chain, says{l.state, l.err, &asked})
		}
		a, err := chain.Find(t.Context(), resolve.Question{})
		if (row.kind == fault.Internal) != (err == nil) || err != nil && !fault.Is(err, row.kind) || err == nil &&
			a.State != row.want || asked != row.asked {
			t.Errorf("%s: %q, %v after %d questions; want %q after %d", name, a.State, err, asked, row.want, row.asked)
		}
	}
}

// asks is a finder that records the question, and answers that its driver is published.
type asks struct{ got *resolve.Question }

func (a asks) Find(_ context.Context, q resolve.Question) (resolve.Answer, error) {
	*a.got = q
	return resolve.Answer{State: api.Published}, nil
}

// TestWrongBytesEndNoWait checks a server that does not answer and a registry that sends wrong bytes. The node must
// still wait for the server.
func TestWrongBytesEndNoWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		chain := resolve.Chain{says{"", fault.New(fault.Transient, "refused", ""), &asked},
			says{"", resolve.OtherService(fault.New(fault.Unverified, "wrong bytes", ""), "check it"), &asked}}
		start := time.Now()
		_, err := resolve.WaitLimits{Wait: 10 * time.Minute}.Find(t.Context(), chain, resolve.Question{})
		if !fault.Is(err, fault.Transient) || time.Since(start) != 10*time.Minute || asked < 4 {
			t.Errorf("Find = %v after %v and %d questions; want transient after 10m", err, time.Since(start), asked)
		}
	})
}

// named stands in for a server that has chosen a driver for the wish, and is building it.
type named struct{ d target.Driver }

func (n named) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	return resolve.Answer{State: api.Building, Driver: n.d, Source: resolve.SourceServer}, nil
}

// TestChainKeepsToTheServersChoice checks that the node asks a registry only for the driver that the server chose.
func TestChainKeepsToTheServersChoice(t *testing.T) {
	t.Parallel()
	var got resolve.Question
	chain := resolve.Chain{named{target.Driver{Version: "535.261.03", Flavour: target.Proprietary}}, asks{&got}}
	if _, err := chain.Find(t.Context(), resolve.Question{Wish: "R535", Flavour: resolve.Auto}); err != nil {
		t.Fatal(err)
	}
	if got.Wish != "535.261.03" || got.Flavour != "proprietary" {
		t.Errorf("the registry is asked for %s, %s; want what the server named", got.Wish, got.Flavour)
	}
}

// TestChainKeepsToAChoiceOfAServerThatFails checks a server that fails after its first answer. The node must not ask a
// registry for another driver than the server chose.
func TestChainKeepsToAChoiceOfAServerThatFails(t *testing.T) {
	t.Parallel()
	away := fault.New(fault.Transient, "away", "")
	for _, row := range []struct {
		name   string
		server resolve.Server
		gpu    string
		asked  resolve.Question // the question to the registry
	}{
		{"the list of GPUs cannot be read", resolve.Server{Client: farm{"open"}, GPUs: lists(nil, away)}, turing,
			resolve.Question{}},
		{"the list of the other flavour cannot be read", resolve.Server{Client: farm{"open proprietary"},
			GPUs: func(_ context.Context, _, _ string, d target.Driver, _ target.Kernel) (*gpulist.List, error) {
				if d.Flavour == target.Open {
					return release, nil
				}
				return nil, away
			}}, "0x27b8", resolve.Question{}},
		{"the server does not say where the other flavour is", resolve.Server{
			Client: &server{answers: []any{published(func(r *api.Resolution) { r.Driver.Version = "535.2.2" }), away}},
			GPUs:   lists(release, nil)}, "0x27b8", resolve.Question{Wish: "535.2.2", Flavour: "proprietary"}},
	} {
		var got resolve.Question
		q := question
		q.GPUs = gpus(row.gpu)
		a, err := resolve.Chain{row.server, asks{&got}}.Find(t.Context(), q)
		if got.Wish != row.asked.Wish || got.Flavour != row.asked.Flavour ||
			(row.asked.Wish == "") != fault.Is(err, fault.Transient) {
			t.Errorf("%s: Find = %+v, %v; the registry is asked for %q, %q; want %q, %q", row.name, a, err, got.Wish,
				got.Flavour, row.asked.Wish, row.asked.Flavour)
		}
	}
}

// TestChainKeepsToAChoiceOfARegistryThatFails checks a registry that has the artifact but fails before the node knows
// the right flavour. A mirror without the list of GPUs must not choose the flavour instead.
func TestChainKeepsToAChoiceOfARegistryThatFails(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	open := newOpenSample(t, key)
	open.Bundles = append(open.Bundles, key.Statement(t, open.Digest, gpulist.PredicateType, release))
	bare := open // a mirror may have the artifact before its statements
	bare.Bundles = nil
	d := target.Driver{Version: "535.2.2", Flavour: target.Proprietary}
	proprietary := testkit.NewSample(t, key, open.Kernel, d, "")
	for name, row := range map[string]struct {
		fails  string
		mirror []testkit.Sample
		want   string // the digest; "" means an error
	}{
		"the list of GPUs cannot be read": {"/referrers/", []testkit.Sample{bare}, ""},
		"the tag of the flavour that fits is not served": {"/manifests/" + bundle.KernelTag(open.Kernel, d),
			[]testkit.Sample{bare}, ""},
		"the mirror has the flavour that fits": {"/manifests/" + bundle.KernelTag(open.Kernel, d),
			[]testkit.Sample{bare, proprietary}, proprietary.Digest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, mirror := testkit.Registry(t, true)+"/x", testkit.Registry(t, true)+"/x"
			open.Publish(t, openRepository(t, first, nil))
			for _, s := range row.mirror {
				s.Publish(t, openRepository(t, mirror, nil))
			}
			by := &requests{fails: row.fails}
			repository := func(ref string) *registry.Repository {
				if ref == first {
					return openRepository(t, ref, by)
				}
				return openRepository(t, ref, nil)
			}
			gpuList := resolve.Signed(key.Verifier(t), func(ref string) (resolve.Attachments, error) {
				return repository(ref), nil
			}, first, mirror)
			var chain resolve.Chain
			for _, ref := range []string{first, mirror} {
				chain = append(chain, resolve.Registry{Ref: ref, GPUs: gpuList,
					Resolve: func(ctx context.Context, tag string) (string, error) {
						d, err := repository(ref).Resolve(ctx, tag)
						return d.Digest.String(), err
					}})
			}
			q := resolve.Question{Kernel: open.Kernel, Wish: "535.2.2", Flavour: resolve.Auto, GPUs: gpus("0x27b8")}
			a, err := chain.Find(t.Context(), q)
			if row.want == "" && !fault.Is(err, fault.Transient) || row.want != "" && (err != nil || a.Digest != row.want) {
				t.Errorf("Find = %+v, %v; want %q, or transient, because the open flavour does not do", a, err, row.want)
			}
		})
	}
}
