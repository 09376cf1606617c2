package httpapi

import (
	"cmp"
	"context"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/prebake/prebake/pkg/api"
)

// metrics are the server's metrics, in their own registry. The library's global registry also contains metrics of
// linked packages.
type metrics struct {
	registry *prometheus.Registry
	took     *prometheus.HistogramVec
}

func newMetrics(c Config) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "prebake_http_request_seconds", Help: "Duration of HTTP requests by route, method and status.",
			Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60, 300},
		}, []string{"route", "method", "status"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "prebake_build_info", Help: "Version of the server.",
		ConstLabels: prometheus.Labels{"version": c.Version}})
	info.Set(1)
	if c.Free != nil {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "prebake_disk_free_bytes",
			Help: "Free space on the disk of the data folder."}, func() float64 {
			free, err := c.Free()
			if err != nil {
				return math.NaN()
			}
			return float64(free)
		}))
	}
	if c.Damaged != nil {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "prebake_registry_damaged",
			Help: "Blobs and manifests of the server's registry that are damaged or lost, until they are pushed again or " +
				"no longer needed. Also files and folders of it that the server cannot read or move, until it " +
				"can."}, func() float64 { return float64(c.Damaged()) }))
	}
	m.registry.MustRegister(
		m.took,
		info,
		&inventory{c},
		&farmCollector{c: c},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}

// measure is a middleware that measures the duration of each request. The label route is the route's pattern, because
// clients could make any number of paths.
func (m *metrics) measure(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin, seen := time.Now(), middleware.NewWrapResponseWriter(w, r.ProtoMajor)
		next.ServeHTTP(seen, r)
		route := "none"
		if rc := chi.RouteContext(r.Context()); rc != nil && rc.RoutePattern() != "" {
			route = rc.RoutePattern()
		}
		method := r.Method
		switch method {
		case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
		default:
			method = "other"
		}
		m.took.WithLabelValues(
			route,
			method,
			strconv.Itoa(cmp.Or(seen.Status(), http.StatusOK)),
		).Observe(
			time.Since(begin).Seconds(),
		)
	})
}

// inventory collects the numbers of builds, artifacts and jobs when Prometheus asks.
type inventory struct{ c Config }

func coverageDesc() *prometheus.Desc {
	return prometheus.NewDesc(
		"prebake_coverage_cells",
		"Cells that wish lists want, by state, without early warnings.",
		[]string{"state"},
		nil,
	)
}

func inventoryDescs() (builds, artifacts, jobs *prometheus.Desc) {
	return prometheus.NewDesc("prebake_builds", "Builds by state, without those that --keep-builds removed. If more than "+
			"10,000 have ended, the numbers of ended ones may be a minute old.", []string{"state"}, nil),
		prometheus.NewDesc("prebake_artifacts", "Artifacts by state.", []string{"state"}, nil),
		prometheus.NewDesc("prebake_queue_jobs", "Jobs in the build queue by state.", []string{"state"}, nil)
}

func (i *inventory) Describe(out chan<- *prometheus.Desc) {
	builds, artifacts, jobs := inventoryDescs()
	out <- builds
	out <- artifacts
	out <- jobs
	out <- coverageDesc()
}

func (i *inventory) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	builds, artifacts, jobs := inventoryDescs()
	count := func(desc *prometheus.Desc, state string, n int) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n), state)
	}
	if counts, err := i.c.Store.CountBuilds(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(builds, err)
	} else {
		for _, state := range []api.State{api.Queued, api.Building, api.Published, api.Failed, api.Cancelled} {
			count(builds, string(state), counts[state])
		}
	}
	if counts, err := i.c.Store.CountArtifacts(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(artifacts, err)
	} else {
		for _, state := range []api.State{api.Published, api.Yanked, api.Quarantined} {
			count(artifacts, string(state), counts[state])
		}
	}
	if v, err := i.c.Catalogue.Coverage(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(coverageDesc(), err)
	} else {
		for state, n := range map[string]int{
			"published": v.Total.Published, "building": v.Total.Building, "queued": v.Total.Queued, "failed": v.Total.Failed,
			"withdrawn": v.Total.Withdrawn, "unsupported": v.Total.Unsupported, "missing": v.Total.Missing,
		} {
			count(coverageDesc(), state, n)
		}
	}
	if depth, err := i.c.Queue.Depth(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(jobs, err)
	} else {
		for state, n := range depth {
			count(jobs, state, n)
		}
	}
}
