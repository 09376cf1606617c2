package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// row has the measurements of one load. A load is a series of calls of one kind.
type row struct {
	name   string
	took   []time.Duration
	failed int
	// largest is the size of the largest response, in bytes on the wire; 0 means not measured.
	largest int64
	// server and load are the processor time of the server and of this program, in cores. A negative value means not
	// measured.
	server, load float64
}

// percentile returns a percentile of the durations; 100 is the maximum.
func (r *row) percentile(percent int) time.Duration {
	if len(r.took) == 0 {
		return 0
	}
	slices.Sort(r.took)
	return r.took[min(len(r.took)-1, len(r.took)*percent/100)]
}

// tally has the measurements of one caller.
type tally struct {
	took    []time.Duration
	failed  int
	largest int64
}

func (t *tally) add(begin time.Time, ok bool) {
	t.took = append(t.took, time.Since(begin))
	if !ok {
		t.failed++
	}
}

func (r *row) join(all []tally) {
	for _, t := range all {
		r.took = append(r.took, t.took...)
		r.failed += t.failed
		r.largest = max(r.largest, t.largest)
	}
}

// troubles maps the text of each error to a path whose request failed with this error.
var troubles sync.Map

// get requests a path, and records an error in troubles.
func get(ctx context.Context, c *connection, path string) bool {
	err := c.get(path)
	if err != nil && ctx.Err() == nil {
		text := err.Error()
		if i := strings.LastIndex(text, ": "); i >= 0 {
			text = text[i+2:] // without the addresses
		}
		troubles.LoadOrStore(text, path)
	}
	return err == nil
}

// callers is the maximum number of simultaneous calls. A proxy in front of many nodes opens about as many connections.
const callers = 128

// callAtRate makes calls at a fixed rate. It measures each call from the time at which the call was due. If the server
// is slow, calls start late, and this delay counts too. If fresh is true, each call opens a new connection.
func callAtRate(ctx context.Context, host string, rate int, length time.Duration, fresh bool, path func() string) *row {
	var wait sync.WaitGroup
	var next atomic.Int64
	begin, total := time.Now(), int64(length.Seconds()*float64(rate))
	all := make([]tally, callers)
	for i := range all {
		wait.Go(func() {
			c := &connection{host: host}
			defer c.close()
			for ctx.Err() == nil {
				n := next.Add(1)
				if n > total {
					return
				}
				due := begin.Add(time.Duration(n) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				all[i].add(due, get(ctx, c, path()))
				all[i].largest = c.largest
				if fresh {
					c.close()
				}
			}
		})
	}
	wait.Wait()
	r := &row{}
	r.join(all)
	return r
}

// measure runs all loads, one after the other. The first row, /healthz, is the cheapest call; the table compares the
// others with it.
func measure(ctx context.Context, p *process, w world, s settings) ([]*row, error) {
	host := strings.TrimPrefix(p.url, "http://")
	question := func() string {
		k := w.kernels[rand.IntN(len(w.kernels))]
		driver := "default"
		if rand.IntN(4) == 0 {
			driver = w.versions[rand.IntN(len(w.versions))]
		}
		return "/v1/resolve?board=" + k.Board + "&buildId=" + k.BuildID + "&driver=" + driver + "&flavour=open"
	}
	trial := &connection{host: host}
	defer trial.close()
	if err := trial.get(question()); err != nil {
		return nil, fmt.Errorf("ask the server at %s: %w", p.url, err)
	}
	var rows []*row
	add := func(name string, load func() *row) {
		if len(rows) > 0 && s.only != nil && !s.only.MatchString(name) {
			return
		}
		before := p.cpu()
		r := load()
		r.name, r.server, r.load = name, -1, -1
		if after := p.cpu(); before.ok && after.ok {
			took := after.at.Sub(before.at).Seconds()
			r.server, r.load = (after.server-before.server).Seconds()/took, (after.load-before.load).Seconds()/took
		}
		rows = append(rows, r)
	}
	fixed := func(path string) func() string { return func() string { return path } }
	add("healthz", func() *row { return callAtRate(ctx, host, 200, 5*time.Second, false, fixed("/healthz")) })

	// During all loads, these calls check the server's readiness, as a kubelet does, but more often.
	var ready tally
	probing, stop := context.WithCancel(ctx)
	var probes sync.WaitGroup
	probes.Go(func() {
		c := &connection{host: host}
		defer c.close()
		for probing.Err() == nil {
			begin := time.Now()
			ready.add(begin, get(ctx, c, "/readyz"))
			time.Sleep(100 * time.Millisecond)
		}
	})
	add("resolve, the first about each kernel", func() *row { return askOnce(ctx, host, w) })
	add(fmt.Sprintf("resolve, %d/s", s.rate), func() *row {
		return callAtRate(ctx, host, s.rate, s.length, false, question)
	})
	for _, l := range []struct{ name, path string }{
		{"healthz, 20/s as the lists", "/healthz"}, {"kernels", "/v1/kernels"},
		{"kernels of a milestone", "/v1/kernels?milestone=109"}, {"artifacts", "/v1/artifacts"},
		{"builds", "/v1/builds"}, {"failed builds", "/v1/builds?state=failed"}, {"cells of 20 kernels", "/v1/cells?limit=20"},
		{"cells, page by page", ""}, {"matrix page", "/"}, {"matrix page, any", ""},
		{"matrix page, failed", "/?state=failed"}, {"matrix page, searched", ""}, {"cell page", ""}, {"queue page", "/queue"},
		{"releases page", "/releases"}, {"preflight page", ""}, {"feed", "/feed.atom"}, {"badge", "/badge.svg"},
	} {
		path := fixed(l.path)
		switch l.name {
		case "cells, page by page":
			path = func() string { return "/v1/cells?limit=20&after=" + url.QueryEscape(w.cursor()) }
		case "matrix page, any":
			path = func() string { return "/?after=" + url.QueryEscape(w.cursor()) }
		case "matrix page, searched":
			path = func() string { return "/?q=" + w.kernels[rand.IntN(len(w.kernels))].BuildID[:7] }
		case "cell page":
			path = func() string {
				k := w.kernels[rand.IntN(len(w.kernels))]
				return "/cells/" + k.Board + "/" + k.BuildID + "/" + w.versions[rand.IntN(len(w.versions))]
			}
		case "preflight page":
			path = func() string {
				k := w.kernels[rand.IntN(len(w.kernels))]
				return "/preflight?board=" + k.Board + "&build=" + k.BuildID
			}
		}
		add(l.name, func() *row { return callAtRate(ctx, host, 20, s.length*2/3, false, path) })
	}
	add("resolve, 300/s, beside 50 that ask for the largest pages", func() *row {
		return measureBesideCrowd(ctx, host, s, question)
	})
	add(fmt.Sprintf("boot storm of %d nodes", s.storm), func() *row {
		return callAtRate(ctx, host, s.storm/max(1, int(s.stormLength.Seconds())), s.stormLength, true, question)
	})
	stop()
	probes.Wait()
	all := &row{name: "readyz, throughout", server: -1, load: -1}
	all.join([]tally{ready})
	return append(rows, all), ctx.Err()
}

// askOnce sends one request for each kernel, two at a time. For each, the server reads the database, and then caches
// the result.
func askOnce(ctx context.Context, host string, w world) *row {
	next := make(chan string)
	all := make([]tally, 2)
	var wait sync.WaitGroup
	for i := range all {
		wait.Go(func() {
			c := &connection{host: host}
			defer c.close()
			for id := range next {
				begin := time.Now()
				all[i].add(begin, get(ctx, c, "/v1/resolve?board=lakitu&buildId="+id))
			}
		})
	}
	for _, k := range w.kernels {
		next <- k.BuildID
	}
	close(next)
	wait.Wait()
	r := &row{}
	r.join(all)
	return r
}

// measureBesideCrowd measures requests of nodes while fifty other clients request the largest pages without a pause.
func measureBesideCrowd(ctx context.Context, host string, s settings, question func() string) *row {
	const clients = 50
	asking, stop := context.WithCancel(ctx)
	var wait sync.WaitGroup
	for i := range clients {
		path := []string{"/v1/kernels?limit=1000", "/v1/artifacts?limit=1000", "/v1/builds?limit=1000", "/v1/cells?limit=100",
			"/"}[i%5]
		wait.Go(func() {
			c := &connection{host: host}
			defer c.close()
			for asking.Err() == nil {
				get(asking, c, path)
			}
		})
	}
	r := callAtRate(ctx, host, 300, s.length, false, question)
	stop()
	wait.Wait()
	return r
}
