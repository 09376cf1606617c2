package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/server/internal/store"
)

// TestConformance runs the same suite on each available database. All tests of the suite share the database, so each
// one has its own BUILD_ID.
func TestConformance(t *testing.T) {
	t.Parallel()
	suite := map[string]func(t *testing.T, s *store.Store, buildID string){
		"kernels": testKernels, "drivers": testDrivers, "artifacts": testArtifacts, "builds": testBuilds,
		"one open build": testOneOpenBuild, "waiting and failed": testQueueMetrics, "change": testChange,
		"pages": testPages, "cells": testCells,
		"remembered": testCache,
		"tokens":     testTokens, "audit": testAudit,
		"measured": testWantedCells, "reported": testReports, "filtered": testFilters, "warned": testWarnings,
		"sources": testGPUsAndGKE, "trimmed": testTrim, "old logs": testOldLogs, "guarded": testWishListGuard,
		"beside": testReadDuringWrite, "panicked": testWriteThatPanics,
	}
	run := func(t *testing.T, url string) {
		// Opening the database again must find all migrations made.
		for range 2 {
			s := open(t, url)
			if err := s.Ping(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		s := open(t, url)
		base := time.Now().Unix() % 1000000 * 100
		n := 0
		for name, f := range suite {
			n++
			// testPages adds more COS builds with the same first number, so each test needs another first number.
			id := fmt.Sprintf("%d.1.0", base+int64(n))
			t.Run(name, func(t *testing.T) { f(t, s, id) })
		}
	}
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		run(t, "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		run(t, installed.Postgres(t))
	})
}

func open(t *testing.T, url string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	return s
}

// page has a limit that is larger than the number of all entries of the suite.
var page = store.Page{Limit: 1000}

var (
	noon   = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	driver = target.Driver{Version: "535.261.03", Flavour: target.Open}
)

func kernelOf(buildID string) target.Kernel {
	return target.Kernel{BuildID: buildID, Board: "lakitu", Milestone: 109, Arch: target.AMD64}
}

func testKernels(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	if _, known, err := s.Kernel(ctx, id, "lakitu"); known || err != nil {
		t.Fatalf("Kernel(absent) = %v, %v", known, err)
	}
	full := api.Kernel{Kernel: kernelOf(id), Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("a", 64)),
		Default: "535.261.03", Latest: "535.309.01", Branches: map[string]string{"R535": "535.261.03"}, SeenAt: noon}
	full.Release, full.Version, full.Commit = "6.1.0-47", "#1 SMP", strings.Repeat("c", 40)
	bare := api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "lakitu"}, SeenAt: noon.Add(time.Hour)}
	for _, k := range []api.Kernel{full, bare} {
		if err := s.Write(ctx, func(tx *store.Tx) error { return tx.PutKernel(ctx, k) }); err != nil {
			t.Fatal(err)
		}
	}
	want := full
	want.SeenAt, want.FirstSeenAt = bare.SeenAt, full.SeenAt
	got, known, err := s.Kernel(ctx, id, "lakitu")
	if err != nil || !known {
		t.Fatalf("Kernel() = %v, %v", known, err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("empty fields must leave what is stored (-want +got):\n%s", d)
	}
	all, _, err := s.Kernels(ctx, store.KernelFilter{}, page)
	if err != nil || len(all) == 0 {
		t.Errorf("Kernels() = %d, %v; want some", len(all), err)
	}
}

func testDrivers(t *testing.T, s *store.Store, _ string) {
	ctx := t.Context()
	want := api.DriverRelease{Version: "535.261.03", Branch: "R535", Flavours: []target.Flavour{target.Open}, SeenAt: noon}
	for _, d := range []api.DriverRelease{want, {Version: want.Version, SeenAt: noon}} {
		if err := s.Write(ctx, func(tx *store.Tx) error { return tx.PutDriver(ctx, d) }); err != nil {
			t.Fatal(err)
		}
	}
	got, _, err := s.Drivers(ctx, page)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]api.DriverRelease{want}, got); d != "" {
		t.Errorf("Drivers() (-want +got):\n%s", d)
	}
}

func testArtifacts(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	digest := "sha256:" + id
	d := target.Driver{Version: "999." + id, Flavour: target.Open} // no other test uses this driver
	first, second := kernelOf(id), kernelOf(id+"1")
	a := api.Artifact{Digest: digest, Repository: "/prebake/driver", Fingerprint: "sha256:f", Driver: d,
		Arch:    target.AMD64,
		Release: "6.1.0", Kernels: []target.Kernel{first}, State: api.Published, PublishedAt: noon}
	if err := s.Write(ctx, func(tx *store.Tx) error { return tx.PutArtifact(ctx, a) }); err != nil {
		t.Fatal(err)
	}
	again := a
	again.Kernels, again.PublishedAt = []target.Kernel{second}, noon.Add(time.Hour)
	if err := s.Write(ctx, func(tx *store.Tx) error { return tx.PutArtifact(ctx, again) }); err != nil {
		t.Fatal(err)
	}
	if err := s.Write(ctx, func(tx *store.Tx) error {
		return tx.SetArtifactState(ctx, digest, api.Yanked, "broken", again.PublishedAt)
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Write(ctx, func(tx *store.Tx) error { return tx.SetReplacement(ctx, digest, "sha256:2") }); err != nil {
		t.Fatal(err)
	}
	want := a
	want.Kernels, want.State, want.Reason = []target.Kernel{first, second}, api.Yanked, "broken"
	want.Replacement, want.WithdrawnAt = "sha256:2", &again.PublishedAt
	got, _, err := s.Artifacts(ctx, store.ArtifactFilter{Driver: d.Version, Flavour: d.Flavour}, page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]api.Artifact{want}, got); diff != "" {
		t.Errorf("Artifacts() (-want +got):\n%s", diff)
	}
	want.Kernels = nil
	if withdrawn, err := s.Withdrawn(ctx, 5); err != nil ||
		!slices.ContainsFunc(withdrawn, func(a api.Artifact) bool { return cmp.Equal(a, want) }) {
		t.Errorf("Withdrawn() = %+v, %v; want %+v among them", withdrawn, err, want)
	}
	if one, err := s.Artifact(ctx, digest); err != nil || one.Digest != digest {
		t.Errorf("Artifact() = %v, %v", one, err)
	}
	if _, err := s.Artifact(ctx, "sha256:absent"); !fault.Is(err, fault.NotFound) {
		t.Errorf("Artifact(absent) = %v; want not-found", err)
	}
	if all, _, err := s.Artifacts(ctx, store.ArtifactFilter{}, page); err != nil || len(all) == 0 {
		t.Errorf("Artifacts(all) = %d, %v; want some", len(all), err)
	}
	if n, err := s.CountArtifacts(ctx); err != nil || n[api.Yanked] == 0 {
		t.Errorf("CountArtifacts() = %v, %v", n, err)
	}
}

func addBuild(ctx context.Context, s *store.Store, b api.Build) (stored api.Build, added bool, err error) {
	err = s.Write(ctx, func(tx *store.Tx) error {
		stored, added, err = tx.AddBuild(ctx, b)
		return err
	})
	return stored, added, err
}

// changeBuild changes a build as the catalogue does: read it, decide, and store it in one transaction.
func changeBuild(ctx context.Context, s *store.Store, id int64, decide func(*api.Build) error) (b api.Build,
	err error) {
	err = s.Write(ctx, func(tx *store.Tx) error {
		if b, err = tx.Build(ctx, id); err != nil {
			return err
		}
		if err := decide(&b); err != nil {
			return err
		}
		return tx.SetBuild(ctx, b)
	})
	return b, err
}

func add(t *testing.T, s *store.Store, id string) api.Build {
	t.Helper()
	b, added, err := addBuild(t.Context(), s,
		api.Build{Kernel: kernelOf(id), Driver: driver, State: api.Queued, CreatedAt: noon})
	if err != nil || !added {
		t.Fatalf("AddBuild() = %v, %v", added, err)
	}
	return b
}

func testBuilds(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	b := add(t, s, id)
	got, err := s.Build(ctx, b.ID)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(b, got); d != "" {
		t.Errorf("Build() (-stored +read):\n%s", d)
	}
	if _, err := s.Build(ctx, 1<<40); !fault.Is(err, fault.NotFound) {
		t.Errorf("Build(absent) = %v; want not-found", err)
	}
	for _, list := range []func() ([]api.Build, error){
		func() ([]api.Build, error) { all, _, err := s.Builds(ctx, store.BuildFilter{}, page); return all, err },
		func() ([]api.Build, error) {
			all, _, err := s.Builds(ctx,
				store.BuildFilter{State: api.Queued, BuildID: id, Board: "lakitu", Driver: driver.Version, Flavour: driver.Flavour},
				page)
			return all, err
		},
		func() ([]api.Build, error) { return s.OpenBuilds(ctx) },
	} {
		all, err := list()
		found := false
		for _, x := range all {
			found = found || x.ID == b.ID
		}
		if err != nil || !found {
			t.Errorf("a list of %d builds lacks build %d: %v", len(all), b.ID, err)
		}
	}
	if none, _, err := s.Builds(ctx, store.BuildFilter{BuildID: id, State: api.Failed}, page); len(none) != 0 ||
		err != nil {
		t.Errorf("Builds(failed) = %v, %v; want none", none, err)
	}
	if n, err := s.CountBuilds(ctx); err != nil || n[api.Queued] == 0 {
		t.Errorf("CountBuilds() = %v, %v", n, err)
	}
}

func testOneOpenBuild(t *testing.T, s *store.Store, id string) {
	const askers = 8
	ids, added := make([]int64, askers), make([]bool, askers)
	var wait sync.WaitGroup
	for i := range askers {
		wait.Go(func() {
			b, isNew, err := addBuild(context.WithoutCancel(t.Context()), s,
				api.Build{Kernel: kernelOf(id), Driver: driver, State: api.Queued, CreatedAt: noon})
			if err != nil {
				t.Error(err)
			}
			ids[i], added[i] = b.ID, isNew
		})
	}
	wait.Wait()
	n := 0
	for i := range askers {
		if added[i] {
			n++
		}
		if ids[i] != ids[0] {
			t.Errorf("asker %d got build %d, asker 0 got %d; want one", i, ids[i], ids[0])
		}
	}
	if n != 1 {
		t.Errorf("%d builds were added; want 1", n)
	}
	done, err := changeBuild(t.Context(), s, ids[0], func(b *api.Build) error { b.State = api.Failed; return nil })
	if err != nil || done.State != api.Failed {
		t.Fatalf("changeBuild() = %v, %v", done.State, err)
	}
	next := add(t, s, id)
	if next.ID == ids[0] {
		t.Error("a closed build was opened again")
	}
	_, err = changeBuild(t.Context(), s, ids[0], func(b *api.Build) error { b.State = api.Queued; return nil })
	if !fault.Is(err, fault.Busy) {
		t.Errorf("opening a second build of a cell = %v; want busy", err)
	}
}

func testChange(t *testing.T, s *store.Store, id string) {
	ctx := t.Context()
	b := add(t, s, id)
	started := noon.Add(time.Minute)
	want := b
	want.State, want.Phase, want.Worker, want.Attempt = api.Building, "compile", "w1", 2
	want.Class, want.Error, want.Hint, want.Digest, want.Tries = "api-break", "x.c:1: error", "none", "sha256:1", 4
	want.Kernel.Release, want.StartedAt, want.FinishedAt, want.HeartbeatAt = "6.1.0-47", &started, &started, &started
	want.Phases = []timeline.Phase{{Name: "source", Start: noon, Seconds: 1.5, Note: "cached"}}
	if _, err := changeBuild(ctx, s, b.ID, func(b *api.Build) error { *b = want; return nil }); err != nil {
		t.Fatal(err)
	}
	refusal := fault.New(fault.Mismatch, "no", "")
	if _, err := changeBuild(ctx, s, b.ID, func(b *api.Build) error { b.Phase = "never"; return refusal }); !fault.Is(err,
		fault.Mismatch) {
		t.Errorf("a refused change = %v; want the refusal", err)
	}
	got, err := s.Build(ctx, b.ID)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("changeBuild() (-want +got):\n%s", d)
	}
	if _, err := changeBuild(ctx, s, 1<<40, func(*api.Build) error { return nil }); !fault.Is(err, fault.NotFound) {
		t.Errorf("changeBuild(absent) = %v; want not-found", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"", "catalogue.db", "sqlite://relative.db", "mysql://x"} {
		if _, err := store.Open(t.Context(), url); !fault.Is(err, fault.Usage) {
			t.Errorf("Open(%q) = %v; want a usage error", url, err)
		}
	}
}

func TestLogs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "7.log.123.part"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	logs, err := store.OpenLogs(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	if _, _, err := logs.Get(7, false); !fault.Is(err, fault.NotFound) {
		t.Errorf("Get(absent) = %v; want not-found", err)
	}
	for _, text := range []string{"first", "second\n"} {
		if err := logs.Put(7, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	f, size, err := logs.Get(7, false)
	if err != nil || size != 7 {
		t.Fatalf("Get() = %d bytes, %v; want the second log", size, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	full := fault.New(fault.DiskFull, "the disk is full", "")
	logs.CheckFree = func() error { return full }
	for what, err := range map[string]error{"Put": logs.Put(7, strings.NewReader("x")),
		"Append": logs.Append(7, 0, strings.NewReader("x"))} {
		if !fault.Is(err, fault.DiskFull) {
			t.Errorf("%s() on a full disk = %v; want disk-full", what, err)
		}
	}
	logs.CheckFree = nil
	if err := logs.Put(7, endless{}); !fault.Is(err, fault.TooLarge) {
		t.Errorf("Put(endless) = %v; want too-large", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v, %v; want one log and no leftovers", entries, err)
	}
}

// TestLogsGrow appends parts to a log. A new attempt must begin the log again, and the complete log must replace the
// parts.
func TestLogsGrow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	logs, err := store.OpenLogs(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	part := func(offset int64, r io.Reader) func() error { return func() error { return logs.Append(7, offset, r) } }
	for _, row := range []struct {
		name string
		do   func() error
		kind fault.Kind // 0 means no error
		want string
		live bool
	}{
		{"first part", part(0, strings.NewReader("one\n")), 0, "one\n", true},
		{"next part", part(4, strings.NewReader("two\n")), 0, "one\ntwo\n", true},
		{"the same part again", part(4, strings.NewReader("two\n")), fault.Mismatch, "one\ntwo\n", true},
		{"a part beyond the end", part(9, strings.NewReader("x")), fault.Mismatch, "one\ntwo\n", true},
		{"a part that breaks off", part(8, io.MultiReader(strings.NewReader("half"), iotest.ErrReader(io.ErrUnexpectedEOF))),
			fault.Internal, "one\ntwo\n", true},
		{"a part without an end", part(8, endless{}), fault.TooLarge, "one\ntwo\n", true},
		{"whole", func() error { return logs.Put(7, strings.NewReader("all")) }, 0, "all", false},
		{"a part that comes late", part(3, strings.NewReader("x")), fault.Mismatch, "all", true},
		{"a beginning that comes late", part(0, strings.NewReader("x")), 0, "all", false},
		{"another try", part(0, strings.NewReader("again")), 0, "again", true},
		{"that begins anew", part(0, strings.NewReader("anew")), 0, "anew", true},
		{"whole at last", func() error { return logs.Put(7, strings.NewReader("end")) }, 0, "end", false},
	} {
		err := row.do()
		if (err != nil || row.kind != 0) && fault.Of(err) != row.kind {
			t.Errorf("%s: %v; want kind %v", row.name, err, row.kind)
		}
		f, size, err := logs.Get(7, row.live)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(f)
		if err := errors.Join(err, f.Close()); err != nil || string(got) != row.want || size != int64(len(row.want)) {
			t.Errorf("after %s: Get() = %q (%d bytes), %v; want %q", row.name, got, size, err, row.want)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v, %v; want one log", entries, err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }
