package httpapi

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// farmSource reads the numbers for the metrics that alerts and autoscaling use.
type farmSource interface {
	CountFailures(ctx context.Context) (map[string]int, error)
	OldestQueued(ctx context.Context) (time.Time, error)
}

// readyDays is the period, in days, of the metrics of how long cells took to become ready. readyPause is the minimum
// pause between two readings, which read a row for each cell.
const (
	readyDays  = 7
	readyPause = time.Minute
)

// openStates are River's states of jobs that a builder works on or will take.
var openStates = []string{"available", "pending", "retryable", "running", "scheduled"}

var (
	openDesc = prometheus.NewDesc("prebake_queue_open_jobs",
		"Jobs that a builder works on or will take; scale builders by this number.", nil, nil)
	oldestDesc = prometheus.NewDesc("prebake_queue_oldest_seconds",
		"Time since the request for the build that waits longest, without early warnings and retries of failed cells; 0 if "+
			"no such build waits.", nil, nil)
	failedDesc = prometheus.NewDesc(
		"prebake_builds_failed",
		"Failed builds, by class, without early warnings and repeated failures: of each cell, the first failure of a class "+
			"since its last success counts. The class other stands for all that this server does not know. The number goes "+
			"down when such a build starts again.",
		[]string{"class"},
		nil,
	)
	readyDesc = prometheus.NewDesc(
		"prebake_release_to_ready_seconds",
		"Time from the discovery of a kernel until a cell of it was ready, by percentile, over the last 7 days.",
		[]string{"percentile"},
		nil,
	)
	readyCellsDesc = prometheus.NewDesc("prebake_release_to_ready_cells",
		"Cells that became ready within the last 7 days.", nil, nil)
)

// farmCollector collects the farm's metrics when Prometheus asks.
type farmCollector struct {
	c Config

	mu    sync.Mutex
	at    time.Time // when the field ready was read
	ready api.ReadyDuration
}

func (f *farmCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{openDesc, oldestDesc, failedDesc, readyDesc, readyCellsDesc} {
		out <- d
	}
}

func (f *farmCollector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, labels...)
	}
	if oldest, err := f.c.Store.OldestQueued(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(oldestDesc, err)
	} else if oldest.IsZero() {
		gauge(oldestDesc, 0)
	} else {
		gauge(oldestDesc, time.Since(oldest).Seconds())
	}
	if failed, err := f.c.Store.CountFailures(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(failedDesc, err)
	} else {
		// Each class starts with 0, so that alerts see the first failure as a change.
		for _, kind := range fault.Kinds() {
			gauge(failedDesc, float64(failed[kind.String()]), kind.String())
			delete(failed, kind.String())
		}
		other := 0 // one label, because newer builders could report any number of classes
		for _, n := range failed {
			other += n
		}
		gauge(failedDesc, float64(other), "other")
	}
	f.collectReady(ctx, out, gauge)
	// The queue comes last, because it may use up the time while its database is away.
	if depth, err := f.c.Queue.Depth(ctx); err != nil {
		out <- prometheus.NewInvalidMetric(openDesc, err)
	} else {
		open := 0
		for _, state := range openStates {
			open += depth[state]
		}
		gauge(openDesc, float64(open))
	}
}

// collectReady collects percentiles of how long cells took to become ready.
func (f *farmCollector) collectReady(ctx context.Context, out chan<- prometheus.Metric,
	gauge func(desc *prometheus.Desc, v float64, labels ...string)) {
	ready, err := f.readyTimes(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(readyDesc, err)
		return
	}
	gauge(readyCellsDesc, float64(ready.Count))
	if ready.Count == 0 {
		return
	}
	gauge(readyDesc, ready.P50, "50")
	gauge(readyDesc, ready.P90, "90")
	gauge(readyDesc, ready.P99, "99")
	gauge(readyDesc, ready.Max, "100")
}

// readyTimes returns percentiles of how long cells took to become ready. It reads them again after readyPause.
func (f *farmCollector) readyTimes(ctx context.Context) (api.ReadyDuration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.at.IsZero() && time.Since(f.at) < readyPause {
		return f.ready, nil
	}
	ready, err := f.c.Catalogue.ReadyTimes(ctx, readyDays)
	if err != nil {
		return ready, err
	}
	f.ready, f.at = ready, time.Now()
	return ready, nil
}
