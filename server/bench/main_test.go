package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/httpapi"
	"github.com/prebake/prebake/server/internal/store"
)

// BenchmarkResolve measures how fast the server answers which driver a node should run. It uses no network.
func BenchmarkResolve(b *testing.B) {
	w, h := handler(b)
	for i := 0; b.Loop(); i++ {
		k := w.kernels[i%len(w.kernels)]
		ask(b, h, fmt.Sprintf("/v1/resolve?buildId=%s&board=%s&driver=default&flavour=open", k.BuildID, k.Board))
	}
}

// BenchmarkArtifacts measures how fast the server makes the first page of the list of artifacts, compressed with gzip.
func BenchmarkArtifacts(b *testing.B) {
	_, h := handler(b)
	for b.Loop() {
		ask(b, h, "/v1/artifacts")
	}
}

// handler returns a handler for a catalogue with 500 kernels, 6 drivers and 10,000 builds.
func handler(b *testing.B) (world, http.Handler) {
	b.Helper()
	w, db := openFilled(b)
	q, err := queue.Open(b.Context(), "sqlite://"+filepath.Join(b.TempDir(), "queue.db"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := q.Close(); err != nil {
			b.Error(err)
		}
	})
	return w, httpapi.New(httpapi.Config{Catalogue: catalogue.New(catalogue.Config{Store: db, Queue: q}), Store: db,
		Queue: q,
		Auth:  auth.New(auth.Config{}), Access: db, Log: slog.New(slog.DiscardHandler)})
}

func ask(b *testing.B, h http.Handler, path string) {
	b.Helper()
	r := httptest.NewRequest(http.MethodGet, path, nil)
	r.Header.Set("Accept-Encoding", "gzip")
	out := httptest.NewRecorder()
	if h.ServeHTTP(out, r); out.Code != http.StatusOK {
		b.Fatalf("GET %s: %d %s", path, out.Code, out.Body)
	}
}

// BenchmarkCells measures how fast the facts about the cells of one kernel are read from the database.
func BenchmarkCells(b *testing.B) {
	w, db := openFilled(b)
	for i := 0; b.Loop(); i++ {
		k := w.kernels[i%len(w.kernels)]
		_, _, err := db.Cells(b.Context(), store.KernelFilter{BuildID: k.BuildID, Board: k.Board}, store.Page{Limit: 1})
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRemembered measures how fast the facts about the cells of one kernel are read from the cache. It also
// reports how many times as long the database takes.
func BenchmarkRemembered(b *testing.B) {
	w, db := openFilled(b)
	begin := time.Now()
	for _, k := range w.kernels {
		if _, _, err := db.Cells(b.Context(), store.KernelFilter{BuildID: k.BuildID, Board: k.Board},
			store.Page{Limit: 1}); err != nil {
			b.Fatal(err)
		}
	}
	database := time.Since(begin) / time.Duration(len(w.kernels))
	for _, k := range w.kernels { // fills the cache
		if _, err := db.KernelCells(b.Context(), k.BuildID, k.Board); err != nil {
			b.Fatal(err)
		}
	}
	for i := 0; b.Loop(); i++ {
		k := w.kernels[i%len(w.kernels)]
		cells, err := db.KernelCells(b.Context(), k.BuildID, k.Board)
		if err != nil || cells == nil {
			b.Fatal(cells, err)
		}
		for d, facts := range cells.All() {
			if d.Version == "" || facts.Newest == nil && len(facts.Artifacts) == 0 {
				b.Fatalf("cell %s of %s has facts %+v", d, k, facts)
			}
		}
	}
	b.ReportMetric(float64(database)/(float64(b.Elapsed())/float64(b.N)), "database/remembered")
}

// openFilled opens a catalogue with 500 kernels, 6 drivers and 10,000 builds.
func openFilled(b *testing.B) (world, *store.Store) {
	b.Helper()
	url := "sqlite://" + filepath.Join(b.TempDir(), "catalogue.db")
	w, err := fill(b.Context(), url, settings{kernels: 500, drivers: 6, builds: 10000, queue: 100})
	if err != nil {
		b.Fatal(err)
	}
	db, err := store.Open(b.Context(), url)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := db.Close(); err != nil {
			b.Error(err)
		}
	})
	return w, db
}
