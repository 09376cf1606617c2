package resolve_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

const (
	volta  = "0x1db1"
	turing = "0x1eb8"
	kepler = "0x102d"
)

// release is the list of GPUs that the driver supports. Unlike in reality, the L4 needs proprietary modules.
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

// lists returns a Lister that returns the same list for every digest, or the error err.
func lists(list *gpulist.List, err error) resolve.Lister {
	return func(context.Context, string, string, target.Driver) (*gpulist.List, error) { return list, err }
}

type autoRow struct {
	name      string
	gpus      []gpulist.GPU
	published string // flavours
	list      *gpulist.List
	want      string // a flavour, or a word of the reason
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
	// A node that asks for a flavour gets that flavour.
	r := resolve.Registry{Ref: "reg/x", GPUs: lists(release, nil),
		Resolve: func(context.Context, string) (string, error) { return digest, nil }}
	q := question
	q.Wish, q.Flavour, q.GPUs = "535.2.2", "open", gpus(volta)
	if a, err := r.Find(t.Context(), q); err != nil || a.Driver.Flavour != target.Open || a.Err() != nil {
		t.Errorf("Find(open on Volta) = %+v, %v; want what was asked for", a, err)
	}
	// An error of a registry must not decide the flavour.
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

// farm is a server with artifacts of one version.
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
	// The server's own answer is returned if only the proprietary flavour fits and is not published.
	q := question
	q.GPUs = gpus(volta)
	if a, err := (resolve.Server{Client: farm{"open"}}).Find(t.Context(), q); err != nil || a.State != api.Unknown ||
		a.Driver.Flavour != target.Proprietary {
		t.Errorf("Find(Volta, only open) = %+v, %v; want that it asks for proprietary", a, err)
	}
	// The node waits for a build of the other flavour that is on its way.
	s := &server{answers: []any{published(func(r *api.Resolution) { r.Driver.Version = "535.2.2" }),
		api.Resolution{State: api.Building, Build: &api.Build{ID: 7}}}}
	q.GPUs = gpus("0x27b8")
	if a, err := (resolve.Server{Client: s, GPUs: lists(release, nil)}).Find(t.Context(), q); err != nil ||
		a.State != api.Building || s.asked.Flavour != "proprietary" || s.asked.Driver != "535.2.2" {
		t.Errorf("Find = %+v, %v, asked %+v; want building, of this version's proprietary flavour", a, err, s.asked)
	}
}

type attached [][]byte

func (a attached) AttachedIf(_ context.Context, _, _ string, useful func([]byte) string,
	_ ...map[string]string) ([][]byte, error) {
	for _, b := range a {
		useful(b)
	}
	return a, nil
}

func TestSigned(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	d := target.Driver{Version: "535.2.2", Flavour: target.Open}
	good := key.Statement(t, digest, gpulist.PredicateType, release)
	other := key.Statement(t, "sha256:"+strings.Repeat("cd", 32), gpulist.PredicateType, release)
	older := key.Statement(t, digest, gpulist.PredicateType, gpulist.List{Version: "535.1.1", Chips: release.Chips})
	empty := key.Statement(t, digest, gpulist.PredicateType, map[string]string{"version": "535.2.2"})
	kind := key.Statement(t, digest, trust.PredicateKernelMatch, release)
	foreign := stranger.Statement(t, digest, gpulist.PredicateType, release)
	for name, row := range map[string]struct {
		bundles [][]byte
		found   bool
	}{
		"good":                 {[][]byte{good}, true},
		"good among junk":      {[][]byte{nil, []byte("junk"), other, older, empty, kind, foreign, good}, true},
		"nothing":              {nil, false},
		"another artifact's":   {[][]byte{other}, false},
		"another version's":    {[][]byte{older}, false},
		"without products":     {[][]byte{empty}, false},
		"another kind's":       {[][]byte{kind}, false},
		"signed by a stranger": {[][]byte{foreign}, false},
	} {
		find := resolve.Signed(key.Verifier(t), func(ref string) (resolve.Attachments, error) {
			if ref != "reg/x" {
				t.Errorf("%s: opened %s", name, ref)
			}
			return attached(row.bundles), nil
		})
		list, err := find(t.Context(), "reg/x", digest, d)
		if err != nil || (list != nil) != row.found {
			t.Errorf("%s: list = %v, %v; want found %v", name, list, err, row.found)
		}
	}
}

// TestSignedElsewhere checks that the list is read from a configured registry if the artifact's repository fails.
func TestSignedElsewhere(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	d := target.Driver{Version: "535.2.2", Flavour: target.Open}
	good := key.Statement(t, digest, gpulist.PredicateType, release)
	open := func(ref string) (resolve.Attachments, error) {
		if ref == "mirror/x" {
			return attached([][]byte{good}), nil
		}
		return nil, fault.New(fault.Transient, ref+" is away", "")
	}
	list, err := resolve.Signed(key.Verifier(t), open, "other/x", "mirror/x")(t.Context(), "reg/x", digest, d)
	if err != nil || list == nil {
		t.Errorf("list = %v, %v; want that of the mirror", list, err)
	}
	_, err = resolve.Signed(key.Verifier(t), open, "reg/x", "other/x")(t.Context(), "reg/x", digest, d)
	if !fault.Is(err, fault.Transient) || strings.Count(err.Error(), "reg/x is away") != 1 ||
		!strings.Contains(err.Error(), "other/x is away") {
		t.Errorf("list of repositories that are away: %v; want transient, and each named once", err)
	}
	// A mirror without the list says nothing about a repository that failed.
	some := func(ref string) (resolve.Attachments, error) {
		if ref == "reg/x" {
			return open(ref)
		}
		return attached(nil), nil
	}
	list, err = resolve.Signed(key.Verifier(t), some, "mirror/x")(t.Context(), "reg/x", digest, d)
	if !fault.Is(err, fault.Transient) || !strings.Contains(err.Error(), "reg/x is away") {
		t.Errorf("list = %v, %v; want transient, because only a mirror without the list responded", list, err)
	}
	// The builder attaches a kernel match after the list, so a mirror with a match and no list has all there is.
	match := key.Statement(t, digest, trust.PredicateKernelMatch, map[string]string{"build": "1"})
	whole := func(ref string) (resolve.Attachments, error) {
		if ref == "reg/x" {
			return open(ref)
		}
		return attached([][]byte{match}), nil
	}
	list, err = resolve.Signed(key.Verifier(t), whole, "mirror/x")(t.Context(), "reg/x", digest, d)
	if err != nil || list != nil {
		t.Errorf("list = %v, %v; want none, because the mirror has a kernel match", list, err)
	}
	lacks := func(ref string) (resolve.Attachments, error) {
		if ref == "reg/x" {
			return nil, fault.New(fault.NoArtifact, "no such artifact", "")
		}
		return attached(nil), nil
	}
	list, err = resolve.Signed(key.Verifier(t), lacks, "mirror/x")(t.Context(), "reg/x", digest, d)
	if err != nil || list != nil {
		t.Errorf("list = %v, %v; want none, because the first repository lacks the artifact", list, err)
	}
}
