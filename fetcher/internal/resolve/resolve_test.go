package resolve_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

type server struct {
	answers []any // api.Resolution or error, one for each call; the last one repeats
	calls   int
	asked   api.Question
}

func (s *server) Base() string { return "http://farm.example:8440" }

func (s *server) Resolve(_ context.Context, q api.Question) (api.Resolution, error) {
	a := s.answers[min(s.calls, len(s.answers)-1)]
	s.calls, s.asked = s.calls+1, q
	if err, ok := a.(error); ok {
		return api.Resolution{}, err
	}
	return a.(api.Resolution), nil
}

var (
	driver   = target.Driver{Version: "535.261.03", Flavour: target.Open}
	digest   = "sha256:" + strings.Repeat("ab", 32)
	question = resolve.Question{Kernel: target.Kernel{BuildID: "1.2.3", Board: "lakitu", Release: "6.1.1+"}, Wish: "R535",
		Flavour: resolve.Auto}
)

func published(edit func(*api.Resolution)) api.Resolution {
	r := api.Resolution{State: api.Published, Driver: driver, Repository: "/prebake/driver", Digest: digest}
	edit(&r)
	return r
}

func TestServer(t *testing.T) {
	t.Parallel()
	same := func(*api.Resolution) {}
	rows := []struct {
		name    string
		answer  any
		wish    target.Wish
		flavour string
		repo    string
		kind    fault.Kind // Internal means no error
	}{
		{"on the server itself", published(same), "R535", "auto", "farm.example:8440/prebake/driver", fault.Internal},
		{"elsewhere", published(func(r *api.Resolution) { r.Repository = "reg.example/x" }), "default", "open",
			"reg.example/x", fault.Internal},
		{"another version", published(same), "535.1.1", "auto", "", fault.Mismatch},
		{"another branch", published(same), "R580", "auto", "", fault.Mismatch},
		{"another flavour", published(same), "default", "proprietary", "", fault.Mismatch},
		{"a GPU type", published(same), "default@NVIDIA_L4", "auto", "farm.example:8440/prebake/driver", fault.Internal},
		{"a GPU type's branch", published(same), "R535@NVIDIA_L4", "auto", "farm.example:8440/prebake/driver",
			fault.Internal},
		{"another branch than a GPU type's", published(same), "R580@NVIDIA_L4", "auto", "", fault.Mismatch},
		{"no driver", published(func(r *api.Resolution) { r.Driver = target.Driver{} }), "default", "auto", "",
			fault.Mismatch},
		{"no digest", published(func(r *api.Resolution) { r.Digest = "latest" }), "default", "auto", "", fault.Unverified},
		{"no repository", published(func(r *api.Resolution) { r.Repository = "" }), "default", "auto", "", fault.Transient},
		{"error keeps its kind", fault.New(fault.Busy, "x", ""), "default", "auto", "", fault.Busy},
	}
	for _, row := range rows {
		q := question
		q.Wish, q.Flavour = row.wish, row.flavour
		s := &server{answers: []any{row.answer}}
		a, err := resolve.Server{Client: s}.Find(t.Context(), q)
		if row.kind == fault.Internal && (err != nil || a.Repository != row.repo || a.Err() != nil) ||
			row.kind != fault.Internal && !fault.Is(err, row.kind) {
			t.Errorf("%s: Find = %+v, %v; want %q, %v", row.name, a, err, row.repo, row.kind)
		}
		want := api.Question{BuildID: "1.2.3", Board: "lakitu", Driver: string(row.wish), Flavour: row.flavour,
			Release: "6.1.1+"}
		if diff := cmp.Diff(want, s.asked); diff != "" {
			t.Errorf("%s: question (-want +got):\n%s", row.name, diff)
		}
	}
}

// TestServerAndDigest checks that a node with a server and a registry finds an artifact by its digest in the registry.
func TestServerAndDigest(t *testing.T) {
	t.Parallel()
	s := &server{answers: []any{published(func(*api.Resolution) {})}}
	r := resolve.Registry{Ref: "reg/x",
		Driver: func(context.Context, string) (target.Driver, error) { return driver, nil }}
	q := question
	q.Pin = "sha256:" + strings.Repeat("cd", 32)
	a, err := resolve.Chain{resolve.Server{Client: s}, r}.Find(t.Context(), q)
	if err != nil || a.Digest != q.Pin || s.calls != 0 {
		t.Errorf("Find = %+v, %v after %d calls of the server; want the digest from the registry", a, err, s.calls)
	}
}

func TestAnswerErr(t *testing.T) {
	t.Parallel()
	for state, kind := range map[api.State]fault.Kind{
		api.Building: fault.NoArtifact, api.Queued: fault.NoArtifact, api.Failed: fault.NoArtifact,
		api.Cancelled:   fault.NoArtifact,
		api.Unsupported: fault.Unsupported, api.Yanked: fault.NoArtifact, api.Quarantined: fault.NoArtifact,
		api.Unknown: fault.NoArtifact, "": fault.NoArtifact,
	} {
		err := resolve.Answer{State: state, Reason: "because"}.Err()
		if !fault.Is(err, kind) || !strings.Contains(err.Error(), "because") || kind != fault.Unsupported &&
			fault.Hint(err) == "" {
			t.Errorf("Answer{%q}.Err() = %v (hint %q); want %v with reason and hint", state, err, fault.Hint(err), kind)
		}
	}
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	tags := map[string]string{"cos-1.2.3-lakitu-535.1.1-proprietary": "p", "cos-1.2.3-lakitu-535.2.2-proprietary": "p",
		"cos-1.2.3-lakitu-535.2.2-open": "o"}
	r := resolve.Registry{Ref: "reg/x", Resolve: func(_ context.Context, tag string) (string, error) {
		if d, ok := tags[tag]; ok {
			return d, nil
		}
		return "", fault.New(fault.NoArtifact, "no tag", "")
	}}
	rows := []struct {
		wish    target.Wish
		flavour string
		digest  string
		kind    fault.Kind // Internal means no error
	}{
		{"535.1.1", "auto", "p", fault.Internal}, {"535.2.2", "auto", "o", fault.Internal},
		{"535.2.2", "proprietary", "p", fault.Internal},
		{"535.1.1", "open", "", fault.Internal}, {"default", "auto", "", fault.Usage}, {"R535", "auto", "", fault.Usage},
		{"latest@NVIDIA_L4", "auto", "", fault.Usage}, {"R535@NVIDIA_L4", "auto", "", fault.Usage},
	}
	for _, row := range rows {
		q := question
		q.Wish, q.Flavour = row.wish, row.flavour
		a, err := r.Find(t.Context(), q)
		if _, gpu := row.wish.GPU(); gpu != "" && !strings.Contains(fault.Hint(err), "--builder") {
			t.Errorf("Find(%s) = %v, hint %q; want a hint for GPU types", row.wish, err, fault.Hint(err))
		}
		if row.kind == fault.Internal && (err != nil || a.Digest != row.digest || (a.Err() == nil) != (row.digest != "")) ||
			row.kind != fault.Internal && !fault.Is(err, row.kind) {
			t.Errorf("Find(%s %s) = %+v, %v; want %q, %v", row.wish, row.flavour, a, err, row.digest, row.kind)
		}
	}
}

func TestPatience(t *testing.T) {
	t.Parallel()
	building := api.Resolution{State: api.Building, Build: &api.Build{ID: 7}}
	away, often := fault.New(fault.Transient, "away", ""), fault.New(fault.TooMany, "too often", "")
	ready := published(func(*api.Resolution) {})
	rows := []struct {
		name    string
		answers []any
		wait    time.Duration
		calls   int
		state   api.State
		kind    fault.Kind // Internal means no error
		took    time.Duration
	}{
		{"at once", []any{ready}, time.Hour, 1, api.Published, fault.Internal, 0},
		{"no patience", []any{building}, 0, 1, api.Building, fault.Internal, 0},
		{"waits for a build", []any{building, away, building, ready}, time.Hour, 4, api.Published, fault.Internal,
			9 * time.Second},
		{"gives up", []any{building}, 10 * time.Second, 4, api.Building, fault.Internal, 10 * time.Second},
		{"service stays away", []any{away}, 10 * time.Second, 4, "", fault.Transient, 10 * time.Second},
		{"asked too often", []any{often, ready}, time.Hour, 2, api.Published, fault.Internal, 3 * time.Second},
		{"a web page to the end", []any{fault.New(fault.WebPage, "page", "")}, 10 * time.Second, 4, "", fault.WebPage,
			10 * time.Second},
		{"too often to the end", []any{often}, 10 * time.Second, 4, "", fault.TooMany, 10 * time.Second},
		{"other errors are final", []any{fault.New(fault.Mismatch, "x", "")}, time.Hour, 1, "", fault.Mismatch, 0},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := &server{answers: row.answers}
				start := time.Now()
				a, err := resolve.WaitLimits{Wait: row.wait, Pauses: backoff.NewConstantBackOff(3 * time.Second)}.Find(
					t.Context(), resolve.Server{Client: s}, question)
				if took := time.Since(start); s.calls != row.calls || took != row.took {
					t.Errorf("Find asked %d times in %v; want %d in %v", s.calls, took, row.calls, row.took)
				}
				if a.State != row.state || row.kind == fault.Internal && err != nil || row.kind != fault.Internal &&
					!fault.Is(err, row.kind) {
					t.Errorf("Find = %+v, %v; want %q, %v", a, err, row.state, row.kind)
				}
			})
		})
	}
}

// timed is a finder that always gives the same answer, and records the times of the questions.
type timed struct {
	err   error
	asked []time.Time
}

func (f *timed) Find(context.Context, resolve.Question) (resolve.Answer, error) {
	f.asked = append(f.asked, time.Now())
	return resolve.Answer{State: api.Building}, f.err
}

// gaps returns the times between successive calls of Find.
func (f *timed) gaps() []time.Duration {
	var gaps []time.Duration
	for i := range f.asked[1:] {
		gaps = append(gaps, f.asked[i+1].Sub(f.asked[i]))
	}
	return gaps
}

// TestPauses checks that waiting nodes ask less and less often, and that two nodes do not ask at the same times. The
// test uses the fake clock of package synctest.
func TestPauses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var first, second timed
		for _, f := range []*timed{&first, &second} {
			if _, err := (resolve.WaitLimits{Wait: 15 * time.Minute}).Find(t.Context(), f, question); err != nil {
				t.Fatal(err)
			}
		}
		one, two := first.gaps(), second.gaps()
		if len(one) < 15 || len(one) > 60 {
			t.Errorf("%d questions in 15 minutes; want 15 to 60", len(one))
		}
		for i, gap := range one {
			if gap < 1500*time.Millisecond || gap > 45*time.Second || i > 10 && gap < 15*time.Second {
				t.Errorf("pause %d is %v; want 1.5 to 45 seconds, and 15 or more after ten questions", i, gap)
			}
		}
		if slices.Equal(one, two) {
			t.Errorf("two nodes wait for the same times: %v", one)
		}
	})
}

// TestRetryAfter checks that a node waits as long as the server's header Retry-After says, but at most five minutes and
// some seconds.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for seconds, want := range map[string]time.Duration{"120": 2 * time.Minute, "86400": 5 * time.Minute} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", seconds)
			w.WriteHeader(http.StatusTooManyRequests)
		}))
		_, err := api.NewClient(srv.URL, "", nil).Resolve(t.Context(), api.Question{})
		srv.Close()
		synctest.Test(t, func(t *testing.T) {
			f := timed{err: fmt.Errorf("ask server: %w", err)}
			if _, err := (resolve.WaitLimits{Wait: time.Hour}).Find(t.Context(), &f, question); err == nil {
				t.Error("Find = nil; want the error of the server")
			}
			for _, gap := range f.gaps() {
				if gap < want || gap > want+45*time.Second {
					t.Errorf("Retry-After %s: pause of %v; want %v and some seconds", seconds, gap, want)
				}
			}
			if len(f.asked) < 2 {
				t.Errorf("Retry-After %s: asked %d times in an hour", seconds, len(f.asked))
			}
		})
	}
}
