// Package report tells the outside how the node's driver is: liveness,
// readiness, the last verdict, and metrics, over HTTP. It refuses to change
// anything, and listens nowhere unless told to.
package report

import (
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

// Server holds the newest verdict and serves it.
type Server struct {
	mux *http.ServeMux

	mu      sync.Mutex
	verdict gpucheck.Verdict

	ready, pci, usable prometheus.Gauge
	info               *prometheus.GaugeVec
	phases             *prometheus.GaugeVec
}

// New returns a server that is not ready.
func New() *Server {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: name, Help: help})
	}
	s := &Server{
		mux:    http.NewServeMux(),
		ready:  gauge("ready", "1 when every GPU of the node answers NVML with the installed driver."),
		pci:    gauge("gpus_present", "NVIDIA GPUs on the PCI bus."),
		usable: gauge("gpus_usable", "GPUs that answer NVML."),
		info: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: "driver_info",
			Help: "1, labelled with the installed driver and the verdict on it."}, []string{"version", "flavour", "digest", "verdict"}),
		phases: prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "prebake_fetcher", Name: "phase_seconds",
			Help: "How long each step of the last installation took."}, []string{"phase", "outcome"}),
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(s.ready, s.pci, s.usable, s.info, s.phases)
	s.mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	s.mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, []byte("{}\n")) })
	s.mux.HandleFunc("GET /readyz", s.readyz)
	return s
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Tell replaces the verdict.
func (s *Server) Tell(v gpucheck.Verdict) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verdict = v
	s.ready.Set(0)
	if v.State == gpucheck.Ready {
		s.ready.Set(1)
	}
	s.pci.Set(float64(v.PCIGPUs))
	s.usable.Set(float64(v.UsableGPUs))
	s.info.Reset()
	s.info.WithLabelValues(v.Driver.Version, string(v.Driver.Flavour), v.Digest, string(v.State)).Set(1)
}

// TellPhases replaces the durations of the last installation.
func (s *Server) TellPhases(phases []timeline.Phase) {
	s.phases.Reset()
	for _, p := range phases {
		outcome := "ok"
		if p.Failed {
			outcome = "failed"
		}
		s.phases.WithLabelValues(p.Name, outcome).Add(p.Seconds)
	}
}

func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	v := s.verdict
	s.mu.Unlock()
	status := http.StatusServiceUnavailable
	if v.State == gpucheck.Ready {
		status = http.StatusOK
	}
	body, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	answer(w, status, append(body, '\n'))
}

func answer(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body) // a caller that went away has nobody to tell
}

// Run serves on the address until the context ends.
func (s *Server) Run(ctx context.Context, listen string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", listen)
	if ctx.Err() != nil && err != nil {
		return nil // told to stop before it began
	}
	if err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("serve status: %w", err), "name a free address of this node with --listen, as in 127.0.0.1:8441")
	}
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) }}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		stopped <- srv.Shutdown(grace)
	})
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return fmt.Errorf("serve status: %w", err)
	}
	return <-stopped
}
