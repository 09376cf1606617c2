// Package report serves the state of the node's driver over HTTP: liveness, readiness, the last verdict, and metrics.
// It changes nothing, and listens only on the given address.
package report

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// Server has the newest verdict and serves it.
type Server struct {
	mux *http.ServeMux

	// now is the clock.
	now func() time.Time

	mu        sync.Mutex
	verdict   gpucheck.Verdict
	verdictAt time.Time // when the verdict was reported
	alive     time.Time // when the last check ended, with any result
	age       time.Duration
	check     gpucheck.CheckTimer

	info   *prometheus.GaugeVec
	phases *prometheus.HistogramVec
	runs   *prometheus.CounterVec
}

// New returns a server that is not ready, with the given clock.
func New(now func() time.Time) *Server {
	s := &Server{
		mux: http.NewServeMux(),
		now: now,
		info: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: "driver_info",
			Help: "Always 1; the labels name the installed driver and the last verdict on it."},
			[]string{"version", "flavour", "digest", "verdict"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "prebake_fetcher", Name: "phase_seconds",
			Help:    "Duration of each step of an installation.",
			Buckets: []float64{.01, .05, .1, .5, 1, 2, 5, 10, 30, 60, 300, 900}, // the upper buckets cover a wait for a build
		}, []string{"phase", "outcome"}),
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "prebake_fetcher", Name: "runs_total",
			Help: "Installations that ended, by the class of their error; the class none means success."}, []string{"class"}),
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.info, s.phases, s.runs,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: "ready",
			Help: "1 when every GPU answers NVML with the installed driver, and the check with cuInit did not fail."},
			func() float64 {
				if s.valid().State == gpucheck.Ready {
					return 1
				}
				return 0
			}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: "gpus_present",
			Help: "NVIDIA GPUs on the PCI bus."},
			func() float64 { return float64(s.valid().PCIGPUs) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: "gpus_usable",
			Help: "GPUs that answer NVML; 0 if they are unusable for CUDA."},
			func() float64 { return float64(s.valid().UsableGPUs) }))
	s.mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	s.mux.HandleFunc("GET /healthz", s.healthz)
	s.mux.HandleFunc("GET /readyz", s.readyz)
	return s
}

// valid returns the last verdict. If that verdict is no longer valid, the result has no state and no usable GPUs.
func (s *Server) valid() gpucheck.Verdict {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.verdict
	if s.unknown() != "" {
		v.State, v.UsableGPUs = "", 0
	}
	return v
}

// unknown returns why the last verdict is no longer valid, or "". The caller holds mu.
func (s *Server) unknown() string {
	now := s.now()
	if since := s.check.HungSince(now); !since.IsZero() {
		return "the driver has not answered the check since " + since.UTC().Format(time.RFC3339)
	}
	if s.age > 0 && now.Sub(s.verdictAt) > s.age {
		return "no check of the driver has finished"
	}
	return ""
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Watch tells the server that periodic checks begin. Without a new verdict within age, /readyz fails. Without the end
// of a check within age, /healthz fails. Age 0 means no deadlines. During a check that hangs, /readyz always fails.
func (s *Server) Watch(age time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.age, s.alive = age, s.now()
}

// Alive tells the server that a check ended, with any result.
func (s *Server) Alive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.alive = s.now()
}

// CheckStarted tells the server that a check started.
func (s *Server) CheckStarted() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.check.Start(s.now())
}

// CheckStopped tells the server that a check ended without a finding about the driver.
func (s *Server) CheckStopped() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.check.Stop(s.now())
}

// Report replaces the verdict.
func (s *Server) Report(v gpucheck.Verdict) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verdict, s.verdictAt = v, s.now()
	s.check.Answer(s.verdictAt)
	s.info.Reset()
	s.info.WithLabelValues(v.Driver.Version, string(v.Driver.Flavour), v.Digest, string(v.State)).Set(1)
}

// ReportRun adds a finished installation to the metrics.
func (s *Server) ReportRun(phases []timeline.Phase, err error) {
	class := "none"
	if err != nil {
		class = fault.Of(err).String()
	}
	s.runs.WithLabelValues(class).Inc()
	for _, p := range phases {
		outcome := "ok"
		if p.Failed {
			outcome = "failed"
		}
		s.phases.WithLabelValues(p.Name, outcome).Observe(p.Seconds)
	}
}

func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	v := s.verdict
	why := s.unknown()
	if why != "" {
		v.Reason = fmt.Sprintf("%s; last seen at %s: %s", why, s.verdictAt.UTC().Format(time.RFC3339),
			cmp.Or(v.Reason, string(v.State)))
	}
	s.mu.Unlock()
	status := http.StatusServiceUnavailable
	if v.State == gpucheck.Ready && why == "" {
		status = http.StatusOK
	}
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer(w, status, append(body, '\n'))
}

// healthz reports whether the program still checks the driver.
func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	dead := s.age > 0 && s.now().Sub(s.alive) > s.age
	s.mu.Unlock()
	if dead {
		answer(w, http.StatusServiceUnavailable, []byte("{\"error\":\"no check of the driver has finished for too long\"}\n"))
		return
	}
	answer(w, http.StatusOK, []byte("{}\n"))
}

func answer(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // an error means that the client is gone
}

// Run serves on the address until the context ends.
func (s *Server) Run(ctx context.Context, listen string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", listen)
	if ctx.Err() != nil && err != nil {
		return nil // the context ended before the server listened
	}
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("serve the node's status over HTTP: %w", err),
			"set a free address of this node, as in --listen 127.0.0.1:8441")
	}
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) }}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- srv.Shutdown(grace)
	})
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return fmt.Errorf("serve the node's status over HTTP: %w", err)
	}
	return <-stopped
}
