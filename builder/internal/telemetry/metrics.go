package telemetry

import (
	"context"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// metrics has its own registry, because linked packages share the library's global one.
type metrics struct {
	registry *prometheus.Registry
	seconds  *prometheus.HistogramVec
	results  *prometheus.CounterVec
	lookups  *prometheus.CounterVec
	running  prometheus.Gauge
	queue    *queueDepth
}

func newMetrics(c Config) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "prebake_build_phase_seconds",
			Help:    "Duration of a build's phases; the label \"of\" names the enclosing phase.",
			Buckets: []float64{.1, .5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1200, 2700},
		}, []string{"phase", "of"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "prebake_builds_total", Help: "Builds that ended; the label class is published, or the class of the failure.",
		}, []string{"class", "flavour", "early_warning"}),
		lookups: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "prebake_cache_lookups_total", Help: "Lookups in the cache, by kind of entry and by result (hit or miss).",
		}, []string{"kind", "result"}),
		running: prometheus.NewGauge(prometheus.GaugeOpts{Name: "prebake_builds_running", Help: "Builds in progress."}),
		queue:   &queueDepth{},
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "prebake_builder_info", Help: "Version of the builder.",
		ConstLabels: prometheus.Labels{"version": c.Version}})
	info.Set(1)
	m.registry.MustRegister(m.seconds, m.results, m.lookups, m.running, m.queue, info,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if c.Cache != nil {
		m.registry.MustRegister(&cacheSize{cache: c.Cache})
	}
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}

func (m *metrics) phase(p timeline.Phase) {
	m.seconds.WithLabelValues(p.Name, p.Of).Observe(p.Seconds)
}

func (m *metrics) result(c Cell, err error) {
	class := "published"
	if err != nil {
		class = fault.Of(err).String()
	}
	m.results.WithLabelValues(class, c.Flavour, strconv.FormatBool(c.EarlyWarning)).Inc()
}

func (m *metrics) lookup(kind string, hit bool) {
	result := "miss"
	if hit {
		result = "hit"
	}
	m.lookups.WithLabelValues(kind, result).Inc()
}

// Queue sets the callback that returns the number of jobs in the queue by state. Each scrape calls the callback. If
// depth is nil, this metric is not served.
func (t *Telemetry) Queue(depth func(context.Context) (map[string]int, error)) {
	if t == nil {
		return
	}
	t.metrics.queue.mu.Lock()
	defer t.metrics.queue.mu.Unlock()
	t.metrics.queue.depth = depth
}

func queueDesc() *prometheus.Desc {
	return prometheus.NewDesc("prebake_queue_jobs", "Jobs in the build queue by state.", []string{"state"}, nil)
}

// queueDepth asks the queue at each scrape how many jobs it has.
type queueDepth struct {
	mu    sync.Mutex
	depth func(context.Context) (map[string]int, error)
}

func (q *queueDepth) Describe(out chan<- *prometheus.Desc) { out <- queueDesc() }

func (q *queueDepth) Collect(out chan<- prometheus.Metric) {
	q.mu.Lock()
	// Queue(nil) waits for this lock, so a caller can close the queue after Queue(nil) returned.
	defer q.mu.Unlock()
	if q.depth == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	counts, err := q.depth(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(queueDesc(), err)
		return
	}
	for state, n := range counts {
		out <- prometheus.MustNewConstMetric(queueDesc(), prometheus.GaugeValue, float64(n), state)
	}
}

func cacheDescs() (bytes, entries *prometheus.Desc) {
	return prometheus.NewDesc("prebake_cache_bytes", "Size of the cache by kind.", []string{"kind"}, nil),
		prometheus.NewDesc("prebake_cache_entries", "Entries of the cache by kind.", []string{"kind"}, nil)
}

// cacheSize measures the cache at most once a minute, because a measurement reads the whole folder.
type cacheSize struct {
	cache *cas.Cache

	mu    sync.Mutex
	at    time.Time
	kinds []cas.Kind
}

func (s *cacheSize) Describe(out chan<- *prometheus.Desc) {
	bytes, entries := cacheDescs()
	out <- bytes
	out <- entries
}

func (s *cacheSize) Collect(out chan<- prometheus.Metric) {
	s.mu.Lock()
	defer s.mu.Unlock()
	bytes, entries := cacheDescs()
	if s.at.IsZero() || time.Since(s.at) > time.Minute {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		kinds, err := s.cache.Kinds(ctx)
		if err != nil {
			out <- prometheus.NewInvalidMetric(bytes, err)
			return
		}
		s.kinds, s.at = kinds, time.Now()
	}
	for _, k := range s.kinds {
		out <- prometheus.MustNewConstMetric(bytes, prometheus.GaugeValue, float64(k.Bytes), k.Name)
		out <- prometheus.MustNewConstMetric(entries, prometheus.GaugeValue, float64(k.Entries), k.Name)
	}
}
