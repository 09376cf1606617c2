package resolve_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

const (
	volta  = "0x1db1"
	turing = "0x1eb8"
	kepler = "0x102d"
)

// release is the list of GPUs that the driver supports. Here, the L4 (0x27b8) needs proprietary modules, which is not
// so in reality.
var release = &gpulist.List{Version: "535.2.2", Chips: []gpulist.Chip{
	{Device: turing, Features: []string{"kernelopen"}}, {Device: volta}, {Device: "0x27b8"},
	{Device: kepler, Legacy: "470.xx"},
}}

func gpus(ids ...string) (all []gpulist.GPU) {
	for _, id := range ids {
		all = append(all, gpulist.GPU{Address: "0000:00:04.0", Device: id})
	}
	return all
}

// lists returns a Lister that returns the same list, or the error err, for every digest.
func lists(list *gpulist.List, err error) resolve.Lister {
	return func(context.Context, string, string, target.Driver, target.Kernel) (*gpulist.List, error) {
		return list, err
	}
}

type autoRow struct {
	name      string
	gpus      []gpulist.GPU
	published string // the published flavours
	list      *gpulist.List
	want      string // a flavour, or a part of the reason
}

var auto = []autoRow{
	{"Turing", gpus(turing), "open proprietary", release, "open"},
	{"Turing without a list", gpus(turing), "open proprietary", nil, "open"},
	{"Turing, only proprietary", gpus(turing), "proprietary", release, "proprietary"},
	{"Volta", gpus(volta), "open proprietary", release, "proprietary"},
	{"Volta without a list", gpus(volta), "open proprietary", nil, "proprietary"},
	{"Turing and Volta", gpus(turing, volta), "open proprietary", release, "proprietary"},
	{"a list that says no to open", gpus("0x27b8"), "open proprietary", release, "proprietary"},
	{"a list that says no to what there is", gpus("0x27b8"), "open", release,
		"the open modules of driver 535.2.2 do not drive"},
	{"a GPU that the driver dropped", gpus(kepler), "open proprietary", release, "needs branch 470.xx"},
	{"no GPU", nil, "open proprietary", release, "open"},
}

func TestAutoByRegistry(t *testing.T) {
	t.Parallel()
	onlyOpen := auto[0]
	onlyOpen.name, onlyOpen.gpus, onlyOpen.published, onlyOpen.want =
		"Volta, only open", gpus(volta), "open", "do not drive GPU 0000:00:04.0 (10de:1db1)"
	rows := slices.Concat(auto, []autoRow{onlyOpen})
	for _, row := range rows {
		r := resolve.Registry{Ref: "reg/x", GPUs: lists(row.list, nil),
			Resolve: func(_ context.Context, tag string) (string, error) {
				for f := range strings.FieldsSeq(row.published) {
					if tag == "cos-1.2.3-lakitu-535.2.2-"+f {
						return digest, nil
					}
				}
				return "", fault.New(fault.NoArtifact, "no tag", "")
			}}
		q := question
		q.Wish, q.GPUs = "535.2.2", row.gpus
		a, err := r.Find(t.Context(), q)
		judge(t, row.name, row.want, a, err)
	}
	// If a node asks for a flavour, it must get that flavour.
	r := resolve.Registry{Ref: "reg/x", GPUs: lists(release, nil),
		Resolve: func(context.Context, string) (string, error) { return digest, nil }}
	q := question
	q.Wish, q.Flavour, q.GPUs = "535.2.2", "open", gpus(volta)
	if a, err := r.Find(t.Context(), q); err != nil || a.Driver.Flavour != target.Open || a.Err() != nil {
		t.Errorf("Find(open on Volta) = %+v, %v; want what was asked for", a, err)
	}
	// If a registry fails, the node must not choose a flavour by itself.
	r.GPUs = lists(nil, fault.New(fault.Transient, "away", ""))
	q.Flavour = resolve.Auto
	if a, err := r.Find(t.Context(), q); !fault.Is(err, fault.Transient) {
		t.Errorf("Find without an answer about the list = %+v, %v; want kind transient", a, err)
	}
}

func judge(t *testing.T, name, want string, a resolve.Answer, err error) {
	t.Helper()
	if _, ferr := target.ParseFlavour(want); ferr == nil {
		if err != nil || a.Err() != nil || string(a.Driver.Flavour) != want {
			t.Errorf("%s: Find = %+v, %v; want %s", name, a, err, want)
		}
		return
	}
	if err != nil || a.State != api.Unsupported || !strings.Contains(a.Reason, want) || fault.Hint(a.Err()) == "" ||
		a.Driver.Flavour != target.Proprietary {
		t.Errorf("%s: Find = %+v, %v; want unsupported because %q, with a hint", name, a, err, want)
	}
}

// farm stands in for a server that has artifacts of one driver version.
type farm struct{ flavours string }

func (f farm) Base() string { return "http://farm.example:8440" }

func (f farm) Resolve(_ context.Context, q api.Question) (api.Resolution, error) {
	d := target.Driver{Version: "535.2.2", Flavour: target.Flavour(q.Flavour)}
	if q.Flavour == resolve.Auto {
		d.Flavour = target.Flavour(strings.Fields(f.flavours)[0])
	}
	if !strings.Contains(f.flavours, string(d.Flavour)) {
		return api.Resolution{State: api.Unknown, Driver: d, Reason: "nobody built it"}, nil
	}
	return api.Resolution{State: api.Published, Driver: d, Repository: "/x", Digest: digest}, nil
}

func TestAutoByServer(t *testing.T) {
	t.Parallel()
	for _, row := range auto {
		q := question
		q.GPUs = row.gpus
		a, err := resolve.Server{Client: farm{row.published}, GPUs: lists(row.list, nil)}.Find(t.Context(), q)
		judge(t, row.name, row.want, a, err)
	}
	// If only the proprietary flavour fits, and it is not published, the node must return the server's answer for that
	// flavour.
	q := question
	q.GPUs = gpus(volta)
	if a, err := (resolve.Server{Client: farm{"open"}}).Find(t.Context(), q); err != nil || a.State != api.Unknown ||
		a.Driver.Flavour != target.Proprietary {
		t.Errorf("Find(Volta, only open) = %+v, %v; want that it asks for proprietary", a, err)
	}
	// If the server is building the other flavour, the node must wait for that build.
	s := &server{answers: []any{published(func(r *api.Resolution) { r.Driver.Version = "535.2.2" }),
		api.Resolution{State: api.Building, Build: &api.Build{ID: 7}}}}
	q.GPUs = gpus("0x27b8")
	if a, err := (resolve.Server{Client: s, GPUs: lists(release, nil)}).Find(t.Context(), q); err != nil ||
		a.State != api.Building || s.asked.Flavour != "proprietary" || s.asked.Driver != "535.2.2" {
		t.Errorf("Find = %+v, %v, asked %+v; want building, of this version's proprietary flavour", a, err, s.asked)
	}
}

// requests counts the requests to a registry. A request fails if its path contains the text fails.
type requests struct {
	fails string
	n     atomic.Int64
}

func (c *requests) RoundTrip(r *http.Request) (*http.Response, error) {
	c.n.Add(1)
	if c.fails != "" && strings.Contains(r.URL.Path, c.fails) {
		return &http.Response{StatusCode: http.StatusServiceUnavailable, Header: http.Header{}, Body: http.NoBody,
			Request: r}, nil
	}
	return http.DefaultTransport.RoundTrip(r)
}

func openRepository(t *testing.T, ref string, by http.RoundTripper) *registry.Repository {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{Transport: by})
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

// newRepository pushes the sample's image to a layout, and attaches bundles with these labels. With nil, each bundle
// gets the labels of its own statement.
func newRepository(t *testing.T, key *testkit.Key, s testkit.Sample, labels map[string]string,
	bundles ...[]byte) (ref string) {
	t.Helper()
	ref = "oci:" + t.TempDir()
	repo := openRepository(t, ref, nil)
	if _, err := repo.Push(t.Context(), s.Image); err != nil {
		t.Fatal(err)
	}
	attach(t, repo, key, s, labels, bundles...)
	return ref
}

func attach(t *testing.T, repo *registry.Repository, key *testkit.Key, s testkit.Sample, labels map[string]string,
	bundles ...[]byte) {
	t.Helper()
	subject, err := repo.Resolve(t.Context(), s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range bundles {
		have := labels
		if have == nil {
			st, err := key.Verifier(t).Statement(raw)
			if err != nil {
				t.Fatal(err)
			}
			have = trust.Labels(st)
		}
		if _, err := repo.Attach(t.Context(), subject, trust.ArtifactTypeBundle, raw, have); err != nil {
			t.Fatal(err)
		}
	}
}

func newOpenSample(t *testing.T, key *testkit.Key) testkit.Sample {
	t.Helper()
	d := target.Driver{Version: "535.2.2", Flavour: target.Open}
	return testkit.NewSample(t, key, testkit.SampleKernel("47"), d, "")
}

func TestSigned(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	s := newOpenSample(t, key)
	good := key.Statement(t, s.Digest, gpulist.PredicateType, release)
	other := key.Statement(t, "sha256:"+strings.Repeat("cd", 32), gpulist.PredicateType, release)
	older := key.Statement(t, s.Digest, gpulist.PredicateType, gpulist.List{Version: "535.1.1", Chips: release.Chips})
	empty := key.Statement(t, s.Digest, gpulist.PredicateType, map[string]string{"version": "535.2.2"})
	kind := key.Statement(t, s.Digest, trust.PredicateKernelMatch, release)
	foreign := stranger.Statement(t, s.Digest, gpulist.PredicateType, release)
	label, none := trust.OfType(gpulist.PredicateType), map[string]string{}
	for name, row := range map[string]struct {
		labels  map[string]string
		bundles [][]byte
		found   bool
	}{
		"good":                 {label, [][]byte{good}, true},
		"good without labels":  {none, [][]byte{good}, true},
		"good among junk":      {label, [][]byte{[]byte("junk"), other, older, empty, kind, foreign, good}, true},
		"nothing":              {label, nil, false},
		"another artifact's":   {label, [][]byte{other}, false},
		"another version's":    {label, [][]byte{older}, false},
		"without products":     {label, [][]byte{empty}, false},
		"another kind's":       {label, [][]byte{kind}, false},
		"signed by a stranger": {label, [][]byte{foreign}, false},
	} {
		ref := newRepository(t, key, s, row.labels, row.bundles...)
		find := resolve.Signed(key.Verifier(t), func(opened string) (resolve.Attachments, error) {
			if opened != ref {
				t.Errorf("%s: opened %s", name, opened)
			}
			return openRepository(t, opened, nil), nil
		})
		list, err := find(t.Context(), ref, s.Digest, s.Identity.Driver, s.Kernel)
		if err != nil || (list != nil) != row.found {
			t.Errorf("%s: list = %v, %v; want found %v", name, list, err, row.found)
		}
	}
}

// TestSignedOfMany counts the requests with which a node looks for the list of GPUs. The artifact serves hundreds of
// COS builds, and has a kernel match for each. A node must not read them all.
func TestSignedOfMany(t *testing.T) {
	t.Parallel()
	const matches, most = 300, 20
	key := testkit.NewKey(t)
	s := newOpenSample(t, key)
	ref := testkit.Registry(t, true) + "/x"
	repo := openRepository(t, ref, nil)
	if _, err := repo.Push(t.Context(), s.Image); err != nil {
		t.Fatal(err)
	}
	attach(t, repo, key, s, nil, s.Bundles...)
	for i := range matches {
		k := s.Kernel
		k.BuildID = fmt.Sprintf("17800.%d.0", i+1)
		attach(t, repo, key, s, nil,
			key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: k, Fingerprint: s.Identity.Fingerprint}))
	}
	const away = "away.example/x"
	by := &requests{}
	open := func(opened string) (resolve.Attachments, error) {
		if opened == away {
			return nil, fault.New(fault.Transient, opened+" is away", "")
		}
		return openRepository(t, opened, by), nil
	}
	find := func(first, second string, found bool) {
		t.Helper()
		by.n.Store(0)
		list, err := resolve.Signed(key.Verifier(t), open, second)(t.Context(), first, s.Digest, s.Identity.Driver, s.Kernel)
		if n := by.n.Load(); err != nil || (list != nil) != found || n > most {
			t.Errorf("list = %v, %v after %d requests; want found %v after at most %d", list, err, n, found, most)
		}
	}
	find(ref, away, false)
	find(away, ref, false) // this also reads the kernel match of the node's COS build
	attach(t, repo, key, s, nil, key.Statement(t, s.Digest, gpulist.PredicateType, release))
	find(ref, away, true)
	find(away, ref, true)
}

// TestSignedBeforeAnError checks that a list of GPUs counts once it was read, although the repository then fails at
// another attachment.
func TestSignedBeforeAnError(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := newOpenSample(t, key)
	ref := testkit.Registry(t, true) + "/x"
	repo := openRepository(t, ref, nil)
	subject, err := repo.Push(t.Context(), s.Image)
	if err != nil {
		t.Fatal(err)
	}
	attach(t, repo, key, s, nil, key.Statement(t, s.Digest, gpulist.PredicateType, release))
	old, err := repo.Attach(t.Context(), subject, trust.ArtifactTypeBundle, []byte("without labels"), nil)
	if err != nil {
		t.Fatal(err)
	}
	by := &requests{fails: old.Digest.String()}
	find := resolve.Signed(key.Verifier(t), func(ref string) (resolve.Attachments, error) {
		return openRepository(t, ref, by), nil
	})
	if list, err := find(t.Context(), ref, s.Digest, s.Identity.Driver, s.Kernel); err != nil || list == nil {
		t.Errorf("list = %v, %v; want the one that was read", list, err)
	}
}

// TestSignedElsewhere checks that the node reads the list of GPUs from a configured registry if the artifact's
// repository fails.
func TestSignedElsewhere(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := newOpenSample(t, key)
	match := func(patch string) []byte {
		return key.KernelMatch(t, s.Digest,
			trust.KernelMatch{Kernel: testkit.SampleKernel(patch), Fingerprint: s.Identity.Fingerprint})
	}
	good := key.Statement(t, s.Digest, gpulist.PredicateType, release)
	mirrors := map[string]string{
		"good":                        newRepository(t, key, s, nil, good),
		"empty":                       newRepository(t, key, s, nil),
		"a match":                     newRepository(t, key, s, nil, match("47")),
		"a match without labels":      newRepository(t, key, s, map[string]string{}, match("47")),
		"a match for another build":   newRepository(t, key, s, nil, match("50")),
		"a match labelled as another": newRepository(t, key, s, map[string]string{trust.LabelPredicate: "x"}, match("47")),
	}
	find := func(first error, others ...string) (*gpulist.List, error) {
		open := func(ref string) (resolve.Attachments, error) {
			switch ref {
			case "reg/x":
				return nil, first
			case "other/x":
				return nil, fault.New(fault.Transient, ref+" is away", "")
			}
			return openRepository(t, ref, nil), nil
		}
		return resolve.Signed(key.Verifier(t), open, others...)(t.Context(), "reg/x", s.Digest, s.Identity.Driver, s.Kernel)
	}
	away := fault.New(fault.Transient, "reg/x is away", "")
	if list, err := find(away, "other/x", mirrors["good"]); err != nil || list == nil {
		t.Errorf("list = %v, %v; want that of the mirror", list, err)
	}
	_, err := find(away, "reg/x", "other/x")
	if !fault.Is(err, fault.Transient) || strings.Count(err.Error(), "reg/x is away") != 1 ||
		!strings.Contains(err.Error(), "other/x is away") {
		t.Errorf("list of repositories that are away: %v; want transient, and each named once", err)
	}
	// If the first repository fails and a mirror has no list of GPUs, the node cannot know whether there is one. But the
	// builder attaches a kernel match after the list. So a mirror that has the match for this node would also have the
	// list.
	for name, ref := range mirrors {
		list, err := find(away, ref)
		switch {
		case name == "good":
		case name == "a match" || name == "a match without labels":
			if err != nil || list != nil {
				t.Errorf("%s: list = %v, %v; want none, because the mirror has a kernel match", name, list, err)
			}
		case !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "reg/x is away"):
			t.Errorf("%s: list = %v, %v; want transient, because only a mirror without the list responded", name, list, err)
		}
	}
	lacks := fault.New(fault.NoArtifact, "no such artifact", "")
	if list, err := find(lacks, mirrors["empty"]); err != nil || list != nil {
		t.Errorf("list = %v, %v; want none, because the first repository lacks the artifact", list, err)
	}
}
