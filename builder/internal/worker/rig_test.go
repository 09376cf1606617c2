package worker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
)

// server is a fake of the server. It has the part of the API that a worker uses.
type server struct {
	*httptest.Server
	// refuse returns the error for an update, or nil to accept it. Tests also use it to react to an update.
	refuse func(u api.BuildUpdate) *api.Problem
	// noRead is the kind of the error that each GET of a build returns. noLog is that of each PUT of a log. 0 means no
	// error.
	noRead, noLog fault.Kind

	mu     sync.Mutex
	states []api.BuildUpdate // updates with a state; their times are removed
	phases []string
	log    string
	live   []byte    // the parts of the log that came while the build was running
	build  api.Build // the answer to each GET and each accepted update of a build
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/builds/{id}", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.noRead != 0 {
			refuse(w, api.Problem{Kind: s.noRead})
			return
		}
		answer(w, http.StatusOK, s.build)
	})
	mux.HandleFunc("PATCH /v1/builds/7", func(w http.ResponseWriter, r *http.Request) {
		var u api.BuildUpdate
		if err := json.NewDecoder(r.Body).Decode(&u); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.refuse != nil {
			if p := s.refuse(u); p != nil {
				refuse(w, *p)
				return
			}
		}
		if u.State != "" {
			s.states = append(s.states, u)
		} else {
			s.phases = append(s.phases, u.Phase)
		}
		answer(w, http.StatusOK, s.build)
	})
	mux.HandleFunc("PUT /v1/builds/{id}/log", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.noLog != 0 {
			refuse(w, api.Problem{Kind: s.noLog})
			return
		}
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		s.log = string(raw)
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("PATCH /v1/builds/7/log", func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if at := r.URL.Query().Get("offset"); at == "0" {
			s.live = nil
		} else if at != strconv.Itoa(len(s.live)) {
			refuse(w, api.Problem{Kind: fault.Mismatch})
			return
		}
		s.live = append(s.live, raw...)
		w.WriteHeader(http.StatusNoContent)
	})
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func refuse(w http.ResponseWriter, p api.Problem) {
	p.Status = p.Kind.HTTPStatus()
	w.Header().Set("Content-Type", "application/problem+json")
	answer(w, p.Status, p)
}

func answer(w http.ResponseWriter, status int, v any) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // if the answer is lost, the test fails later
}

// makeFunc stands for the pipeline in one attempt at a build.
type makeFunc func(ctx context.Context, log io.Writer, line *timeline.Run) (*pipeline.Result, error)

// rig is a worker with one build in its queue.
type rig struct {
	cfg    worker.Config
	queue  *queue.Queue
	server *server
	mu     sync.Mutex
	tries  int
}

func newRig(t *testing.T, tries ...makeFunc) *rig {
	t.Helper()
	dir := t.TempDir()
	queueURL := "sqlite://" + filepath.Join(dir, "queue.db")
	q, err := queue.Open(t.Context(), queueURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	job := api.BuildJob{Build: 7, BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open",
		KernelMirror: "file:///k"}
	if err := q.Insert(t.Context(), job, 0); err != nil {
		t.Fatal(err)
	}
	r := &rig{queue: q, server: newServer(t)}
	r.cfg = worker.Config{
		ID: "w1", State: filepath.Join(dir, "state"), QueueURL: queueURL,
		Server: api.NewClient(r.server.URL, "", nil), Log: slog.New(slog.DiscardHandler),
		Make: func(ctx context.Context, req pipeline.Request, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
			want := pipeline.Request{BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: target.Open,
				KernelMirror: "file:///k"}
			if diff := cmp.Diff(want, req); diff != "" {
				t.Errorf("the pipeline was asked for another cell (-want +got):\n%s", diff)
			}
			r.mu.Lock()
			n := r.tries
			r.tries++
			r.mu.Unlock()
			if n >= len(tries) {
				return &pipeline.Result{}, fmt.Errorf("try %d was not expected", n+1)
			}
			return tries[n](ctx, log, line)
		},
	}
	return r
}

// run runs the worker until the server has received the given number of updates with a state, but at most a minute.
func (r *rig) run(t *testing.T, states int) error {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	heard, refuse := 0, r.server.refuse
	r.server.refuse = func(u api.BuildUpdate) *api.Problem {
		if u.State != "" {
			if heard++; heard == states {
				stop()
			}
		}
		if refuse != nil {
			return refuse(u)
		}
		return nil
	}
	return worker.Run(ctx, r.cfg)
}

var result = pipeline.Result{
	Kernel:       target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Release: "6.1.0-47-cloud-amd64"},
	Fingerprint:  "sha256:1111111111111111111111111111111111111111111111111111111111111111",
	Digest:       "sha256:2222222222222222222222222222222222222222222222222222222222222222",
	Repositories: []string{"here/driver", "there/driver"},
}

func works(_ context.Context, log io.Writer, line *timeline.Run) (*pipeline.Result, error) {
	fmt.Fprintln(log, "all is well")
	res := result
	err := line.Do("source", func() (string, error) { return "", nil })
	return &res, err
}

// fails returns a makeFunc that finds the kernel and then fails with err.
func fails(err error) makeFunc {
	return func(_ context.Context, log io.Writer, _ *timeline.Run) (*pipeline.Result, error) {
		fmt.Fprintln(log, "log of a failure")
		return &pipeline.Result{Kernel: result.Kernel, Fingerprint: result.Fingerprint, Digest: result.Digest}, err
	}
}

// checkQueue checks the state of the build in the queue.
func (r *rig) checkQueue(t *testing.T, want queue.JobState) {
	t.Helper()
	got, err := r.queue.Lookup(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	got.Error, want.Priority = "", queue.PriorityAsked
	if got != want {
		t.Errorf("the queue has %+v; want %+v", got, want)
	}
}

// checkNoLogs checks that no log is left in the worker's state folder.
func (r *rig) checkNoLogs(t *testing.T) {
	t.Helper()
	if left, err := filepath.Glob(filepath.Join(r.cfg.State, "*.log")); err != nil || len(left) > 0 {
		t.Errorf("logs left in the state folder: %v, %v", left, err)
	}
}
