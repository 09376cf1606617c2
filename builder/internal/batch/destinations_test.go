package batch_test

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

var driver = target.Driver{Version: "535.261.03", Flavour: target.Open}

func repository(t *testing.T, ref string) *registry.Repository {
	t.Helper()
	r, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func put(t *testing.T, r *registry.Repository, key *testkit.Key, s testkit.Sample) {
	t.Helper()
	a := publish.Artifact{Image: s.Image, Identity: s.Identity, Kernel: s.Kernel, Bundles: s.Bundles,
		Verifier: key.Verifier(t)}
	if _, _, err := publish.Publish(t.Context(), r, a); err != nil {
		t.Fatal(err)
	}
}

// TestPublished checks that a cell counts as published only if every destination has the same artifact for this COS
// build and driver, signed with the farm's own key.
func TestPublished(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	foreign := testkit.NewSample(t, stranger, testkit.SampleKernel("47"), driver, "")
	other := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "salt")
	mine := repository(t, testkit.Registry(t, true)+"/prebake/driver")
	layout := repository(t, "oci:"+filepath.Join(t.TempDir(), "l"))
	empty := repository(t, testkit.Registry(t, true)+"/prebake/driver")
	theirs := repository(t, testkit.Registry(t, true)+"/prebake/driver")
	salted := repository(t, testkit.Registry(t, true)+"/prebake/driver")
	put(t, mine, key, s)
	put(t, layout, key, s)
	put(t, theirs, stranger, foreign)
	put(t, salted, key, other)
	bucket, err := tarball.Open(t.Context(), "file://"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	down := repository(t, "127.0.0.1:1/x")

	here := plan.Cell{Kernel: target.Kernel{BuildID: s.Kernel.BuildID, Board: s.Kernel.Board, Arch: s.Kernel.Arch},
		Driver: driver}
	elsewhere := here
	elsewhere.Kernel.BuildID = "17800.1.47"
	proprietary := here
	proprietary.Driver.Flavour = target.Proprietary
	type repos = []*registry.Repository
	rows := []struct {
		name    string
		places  repos
		buckets []*tarball.Bucket
		cell    plan.Cell
		want    string
		kind    fault.Kind // class of the expected error; Usage means no error
	}{
		{"one place", repos{mine}, nil, here, s.Digest, fault.Usage},
		{"two places", repos{mine, layout}, nil, here, s.Digest, fault.Usage},
		{"missing in one", repos{mine, empty}, nil, here, "", fault.Usage},
		{"another artifact in one", repos{mine, salted}, nil, here, "", fault.Usage},
		{"signed by a stranger", repos{theirs}, nil, here, "", fault.Usage},
		{"another build", repos{mine}, nil, elsewhere, "", fault.Usage},
		{"another flavour", repos{mine}, nil, proprietary, "", fault.Usage},
		{"no tarball in the bucket", repos{mine}, []*tarball.Bucket{bucket}, here, "", fault.Usage},
		{"no place", nil, nil, here, "", fault.Usage},
		{"a place that does not answer", repos{down}, nil, here, "", fault.Transient},
	}
	for _, row := range rows {
		p := &batch.Destinations{Repositories: row.places, Buckets: row.buckets, Verifier: key.Verifier(t)}
		got, err := p.Published(t.Context(), row.cell)
		if got != row.want || (err == nil) != (row.kind == fault.Usage) || err != nil && fault.Of(err) != row.kind {
			t.Errorf("%s: Published = %q, %v; want %q", row.name, got, err, row.want)
		}
	}
	if err := (&batch.Destinations{Buckets: []*tarball.Bucket{bucket}}).Close(); err != nil {
		t.Error(err)
	}
}

// TestPublishedTooOld checks that a cell counts as not published if the policy limits the age of builds, and the
// artifact's newest build is older.
func TestPublishedTooOld(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	p := testkit.ProvenancePredicate(trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint,
		Driver: driver})
	p["runDetails"].(map[string]any)["metadata"] = map[string]any{"finishedOn": "2025-01-01T00:00:00Z"}
	s.Bundles[0] = key.Statement(t, s.Digest, trust.PredicateProvenance, p)
	repo := repository(t, testkit.Registry(t, true)+"/prebake/driver")
	put(t, repo, key, s)
	cell := plan.Cell{Kernel: target.Kernel{BuildID: s.Kernel.BuildID, Board: s.Kernel.Board, Arch: s.Kernel.Arch},
		Driver: driver}
	for limit, want := range map[time.Duration]string{0: s.Digest, 24 * time.Hour: ""} {
		v, err := trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{key.Public(t)}, MaxAge: limit})
		if err != nil {
			t.Fatal(err)
		}
		d := &batch.Destinations{Repositories: []*registry.Repository{repo}, Verifier: v}
		if got, err := d.Published(t.Context(), cell); err != nil || got != want {
			t.Errorf("Published with a limit of %v = %q, %v; want %q", limit, got, err, want)
		}
	}
}

// TestPublishedBesideJunk attaches invalid statements to an artifact, as anybody with the right to push can. The cell
// must still count as published.
func TestPublishedBesideJunk(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	repo := repository(t, testkit.Registry(t, true)+"/prebake/driver")
	put(t, repo, key, s)
	testkit.AttachJunk(t, repo, s.Digest, trust.PredicateProvenance)
	cell := plan.Cell{Kernel: target.Kernel{BuildID: s.Kernel.BuildID, Board: s.Kernel.Board, Arch: s.Kernel.Arch},
		Driver: driver}
	d := &batch.Destinations{Repositories: []*registry.Repository{repo}, Verifier: key.Verifier(t)}
	if got, err := d.Published(t.Context(), cell); err != nil || got != s.Digest {
		t.Errorf("Published = %q, %v; want %q", got, err, s.Digest)
	}
}

// TestPublishedLostLayer has a registry that lost a layer of an artifact. The cell must not count as published.
func TestPublishedLostLayer(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	ref := testkit.Registry(t, true) + "/prebake/driver"
	put(t, repository(t, ref), key, s)
	layers, err := s.Image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	lost, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	forgetful, err := registry.Open(ref,
		registry.Options{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			if strings.HasSuffix(r.URL.Path, lost.String()) {
				return &http.Response{StatusCode: http.StatusNotFound, Body: http.NoBody, Request: r, Header: http.Header{}}, nil
			}
			return http.DefaultTransport.RoundTrip(r)
		})})
	if err != nil {
		t.Fatal(err)
	}
	p := &batch.Destinations{Repositories: []*registry.Repository{forgetful}, Verifier: key.Verifier(t)}
	if got, err := p.Published(t.Context(), plan.Cell{Kernel: s.Kernel, Driver: driver}); got != "" || err != nil {
		t.Errorf("Published = %q, %v; want nothing", got, err)
	}
}

// Published asks once for each layer, and transfers none.
func TestPublishedTransfersNoLayer(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	ref := testkit.Registry(t, true) + "/prebake/driver"
	put(t, repository(t, ref), key, s)
	want, got := map[string]int{}, map[string]int{}
	for _, l := range s.Layers {
		want["HEAD "+l.Digest] = 1
	}
	var mu sync.Mutex
	counted, err := registry.Open(ref,
		registry.Options{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			if name := path.Base(r.URL.Path); want["HEAD "+name] > 0 {
				got[r.Method+" "+name]++
			}
			return http.DefaultTransport.RoundTrip(r)
		})})
	if err != nil {
		t.Fatal(err)
	}
	p := &batch.Destinations{Repositories: []*registry.Repository{counted}, Verifier: key.Verifier(t)}
	for range 2 {
		if digest, err := p.Published(t.Context(), plan.Cell{Kernel: s.Kernel, Driver: driver}); digest != s.Digest ||
			err != nil {
			t.Fatalf("Published = %q, %v; want %s", digest, err, s.Digest)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("requests for layers (-want +got):\n%s", diff)
	}
}

// A worker that runs for long notices when a registry loses a layer.
func TestPublishedLostLater(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	handler := ggcr.New(ggcr.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)),
		ggcr.WithReferrersSupport(true))
	synctest.Test(t, func(t *testing.T) {
		lost := false
		repo, err := registry.Open("registry.example.com/x", registry.Options{Username: "u", Password: "p",
			Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				w, got := httptest.NewRecorder(), r.Clone(r.Context())
				if got.Body == nil {
					got.Body = http.NoBody
				}
				if lost && strings.HasSuffix(r.URL.Path, s.Layers[0].Digest) {
					w.WriteHeader(http.StatusNotFound)
				} else {
					handler.ServeHTTP(w, got)
				}
				resp := w.Result()
				resp.Request = r
				return resp, nil
			})})
		if err != nil {
			t.Fatal(err)
		}
		put(t, repo, key, s)
		p := &batch.Destinations{Repositories: []*registry.Repository{repo}, Verifier: key.Verifier(t)}
		for _, want := range []string{s.Digest, s.Digest, ""} {
			if got, err := p.Published(t.Context(), plan.Cell{Kernel: s.Kernel, Driver: driver}); got != want || err != nil {
				t.Errorf("Published after the loss %t = %q, %v; want %q", lost, got, err, want)
			}
			lost = true
			time.Sleep(13 * time.Hour)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// files is a fake bucket: the content of small objects by name.
type files map[string]string

func (f files) ReadSmall(_ context.Context, name string, _ int64) ([]byte, error) {
	text, ok := f[name]
	if !ok {
		return nil, fault.New(fault.InputMissing, "no "+name, "")
	}
	return []byte(text), nil
}

// facts is a fake of the builder's cache.
type facts map[string][]byte

func (f facts) PutFact(kind, key string, value []byte) error {
	f[kind+" "+key] = value
	return nil
}

func (f facts) Fact(kind, key string) ([]byte, bool) {
	v, ok := f[kind+" "+key]
	return v, ok
}

// TestMemory checks that Find returns a stored failure for cells with the same inputs, even if the BUILD_ID differs. If
// any input has changed, Find must return nothing.
func TestMemory(t *testing.T) {
	t.Parallel()
	cos := func(build string) files {
		return files{
			build + "/lakitu/kernel-headers.tgz.md5": "aa\n",
			build + "/lakitu/toolchain.tar.xz.md5":   "bb\n",
			build + "/lakitu/toolchain_env":          "CC=x\n",
		}
	}
	kernels, drivers, cache := cos("1.0.1"), files{"sha256/NVIDIA-Linux-x86_64-5.1.run.sha256": "cc\n"}, facts{}
	for name, text := range cos("1.0.2") {
		kernels[name] = text
	}
	m := &batch.FailureStore{Facts: cache, Kernels: kernels, Drivers: drivers, Version: "1"}
	known := batch.Failure{Class: fault.APIBreak, Error: "x.c:1: error", Hint: "newer"}
	c, twin := cell("1.0.1 5.1-open"), cell("1.0.2 5.1-open")
	if err := m.Remember(t.Context(), c, known); err != nil {
		t.Fatal(err)
	}
	for _, same := range []plan.Cell{c, twin} {
		if got, ok := m.Find(t.Context(), same); !ok || got != known {
			t.Errorf("Find(%s) = %+v, %v; want %+v", same, got, ok, known)
		}
	}
	forgotten := func(what string, m *batch.FailureStore, c plan.Cell) {
		t.Helper()
		if got, ok := m.Find(t.Context(), c); ok {
			t.Errorf("%s: Find = %+v; want nothing", what, got)
		}
	}
	forgotten("another flavour", m, cell("1.0.1 5.1-proprietary"))
	forgotten("another version of the builder",
		&batch.FailureStore{Facts: cache, Kernels: kernels, Drivers: drivers, Version: "2"}, c)
	forgotten("other settings",
		&batch.FailureStore{Facts: cache, Kernels: kernels, Drivers: drivers, Version: "1", Settings: "signed"}, c)
	// Module signatures in the bucket are inputs too. If they are new or have changed, Find must return nothing.
	signed := &batch.FailureStore{Facts: facts{}, Kernels: kernels, Drivers: drivers, Version: "1",
		Signatures: func(k target.Kernel, version string) []string {
			return []string{k.BuildID + "/" + version + ".tgz"}
		}}
	for _, sum := range []string{"", "ee\n", "ff\n"} {
		if sum != "" {
			kernels["1.0.1/5.1.tgz.md5"] = sum
		}
		forgotten("signatures "+sum, signed, c)
		if err := signed.Remember(t.Context(), c, known); err != nil {
			t.Fatal(err)
		}
		if _, ok := signed.Find(t.Context(), c); !ok {
			t.Errorf("Find with signatures %q = nothing; want %+v", sum, known)
		}
	}
	forgotten("told to forget",
		&batch.FailureStore{Facts: cache, Kernels: kernels, Drivers: drivers, Version: "1", Forget: true}, c)
	for name := range cos("1.0.2") {
		changed := cos("1.0.2")
		changed[name] = "zz"
		forgotten(name, &batch.FailureStore{Facts: cache, Kernels: changed, Drivers: drivers, Version: "1"}, twin)
	}
	forgotten("another runfile",
		&batch.FailureStore{Facts: cache, Kernels: kernels,
			Drivers: files{"sha256/NVIDIA-Linux-x86_64-5.1.run.sha256": "dd\n"}, Version: "1"}, c)
	// The key of a failure contains the checksums of the inputs. Without a checksum, the store neither stores nor finds a
	// failure.
	delete(kernels, "1.0.1/lakitu/kernel-headers.tgz.md5")
	before := len(cache)
	if err := m.Remember(t.Context(), c, known); err != nil || len(cache) != before {
		t.Errorf("Remember without checksums = %v, %d facts; want none more than %d", err, len(cache), before)
	}
	forgotten("no checksum", m, c)
	// Find must ignore a damaged entry of the cache.
	for k := range cache {
		cache[k] = []byte("{")
	}
	forgotten("damaged", m, twin)
}
