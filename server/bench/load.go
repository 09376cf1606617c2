package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// row is one line of the table.
type row struct {
	name   string
	took   []time.Duration
	failed int
}

// at returns a percentile; 100 is the maximum.
func (r *row) at(percent int) time.Duration {
	if len(r.took) == 0 {
		return 0
	}
	slices.Sort(r.took)
	return r.took[min(len(r.took)-1, len(r.took)*percent/100)]
}

// meter collects a row from many goroutines.
type meter struct {
	mu sync.Mutex
	row
}

func (m *meter) add(begin time.Time, ok bool) {
	took := time.Since(begin)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.took = append(m.took, took)
	if !ok {
		m.failed++
	}
}

// troubles are the first of each kind of error that calls ended with.
var troubles sync.Map

// get reads an answer to its end.
func get(ctx context.Context, c *http.Client, at string) bool {
	err := try(ctx, c, at)
	if err != nil && ctx.Err() == nil {
		text := err.Error()
		if i := strings.LastIndex(text, ": "); i >= 0 {
			text = text[i+2:] // without the question
		}
		troubles.LoadOrStore(text, at)
	}
	return err == nil
}

func try(ctx context.Context, c *http.Client, at string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, errors.New(resp.Status))
	}
	return errors.Join(err, resp.Body.Close())
}

// client keeps connections as a fleet behind one proxy would.
func client() *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns, t.MaxIdleConnsPerHost, t.MaxConnsPerHost = 128, 128, 128
	return &http.Client{Transport: t, Timeout: 30 * time.Second}
}

// paced calls at a fixed rate, whatever the answers take: time counts from when a
// call was due, so that a server that falls behind shows it.
func paced(ctx context.Context, name string, rate int, length time.Duration, call func() bool) *meter {
	m := &meter{row: row{name: name}}
	var wait sync.WaitGroup
	begin, total := time.Now(), int(length.Seconds()*float64(rate))
	for sent := 0; sent < total && ctx.Err() == nil; {
		due := int(time.Since(begin).Seconds() * float64(rate))
		for ; sent < min(due, total); sent++ {
			at := begin.Add(time.Duration(sent+1) * time.Second / time.Duration(rate))
			wait.Go(func() { m.add(at, call()) })
		}
		time.Sleep(500 * time.Microsecond)
	}
	wait.Wait()
	return m
}

// measure runs all loads, one after the other. The first row is the floor.
func measure(ctx context.Context, base string, w world, s settings) ([]*row, error) {
	c := client()
	question := func() string {
		k := w.kernels[rand.IntN(len(w.kernels))]
		driver := "default"
		if rand.IntN(4) == 0 {
			driver = w.versions[rand.IntN(len(w.versions))]
		}
		return base + "/v1/resolve?" + url.Values{
			"buildId": {k.BuildID},
			"board":   {k.Board},
			"driver":  {driver},
			"flavour": {"open"},
		}.Encode()
	}
	resolve := func() bool { return get(ctx, c, question()) }
	if !resolve() {
		return nil, fmt.Errorf("the server does not answer %s", question())
	}
	var rows []*row
	add := func(m *meter) { rows = append(rows, &m.row) }
	add(paced(ctx, "healthz", 200, 5*time.Second, func() bool { return get(ctx, c, base+"/healthz") }))

	// Readiness is asked throughout, as a kubelet does, only oftener.
	ready := &meter{row: row{name: "readyz, throughout"}}
	probing, stop := context.WithCancel(ctx)
	var probes sync.WaitGroup
	probes.Go(func() {
		for probing.Err() == nil {
			begin := time.Now()
			ready.add(begin, get(ctx, c, base+"/readyz"))
			time.Sleep(100 * time.Millisecond)
		}
	})
	add(first(ctx, base, c, w))
	add(paced(ctx, fmt.Sprintf("resolve, %d/s", s.rate), s.rate, s.length, resolve))
	for _, l := range []struct{ name, path string }{
		{"kernels", "/v1/kernels"}, {"kernels of a milestone", "/v1/kernels?milestone=109"}, {"artifacts", "/v1/artifacts"},
		{"builds", "/v1/builds"}, {"failed builds", "/v1/builds?state=failed"}, {"cells of 20 kernels", "/v1/cells?limit=20"},
		{"matrix page", "/"},
	} {
		add(paced(ctx, l.name, 10, s.length/3, func() bool { return get(ctx, c, base+l.path) }))
	}
	add(crowd(ctx, base, s, resolve))
	add(
		paced(
			ctx,
			fmt.Sprintf("boot storm of %d nodes", s.storm),
			s.storm/max(1, int(s.stormLength.Seconds())),
			s.stormLength,
			func() bool {
				node := client() // each node comes by a connection of its own
				defer node.CloseIdleConnections()
				return get(ctx, node, question())
			},
		),
	)
	stop()
	probes.Wait()
	add(ready)
	return rows, ctx.Err()
}

// first asks about each kernel once, two at a time: the server has to read what it
// remembers from then on.
func first(ctx context.Context, base string, c *http.Client, w world) *meter {
	m := &meter{row: row{name: "resolve, the first about each kernel"}}
	next := make(chan string)
	var wait sync.WaitGroup
	for range 2 {
		wait.Go(func() {
			for id := range next {
				begin := time.Now()
				m.add(begin, get(ctx, c, base+"/v1/resolve?board=lakitu&buildId="+id))
			}
		})
	}
	for _, k := range w.kernels {
		next <- k.BuildID
	}
	close(next)
	wait.Wait()
	return m
}

// crowd has fifty clients ask for the largest pages, over and over, while nodes ask.
func crowd(ctx context.Context, base string, s settings, resolve func() bool) *meter {
	const clients = 50
	asking, stop := context.WithCancel(ctx)
	var wait sync.WaitGroup
	for i := range clients {
		c := client()
		path := []string{"/v1/kernels?limit=1000", "/v1/artifacts?limit=1000", "/v1/builds?limit=1000", "/v1/cells?limit=100", "/"}[i%5]
		wait.Go(func() {
			for asking.Err() == nil {
				get(asking, c, base+path)
			}
			c.CloseIdleConnections()
		})
	}
	m := paced(ctx, "resolve, 300/s, beside 50 that ask for the largest pages", 300, s.length, resolve)
	stop()
	wait.Wait()
	return m
}
