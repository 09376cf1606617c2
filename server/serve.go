package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/server/internal/auth"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/discover"
	"github.com/prebake/prebake/server/internal/httpapi"
	"github.com/prebake/prebake/server/internal/jobs"
	"github.com/prebake/prebake/server/internal/ocistore"
	"github.com/prebake/prebake/server/internal/store"
	"github.com/prebake/prebake/server/internal/web"
)

// settings has the values of serve's flags.
type settings struct {
	Listen, Data, Database, Queue, KernelMirror, DriverMirror, GKEMap, PublicRepository string
	Token, TokenFile                                                                    string
	TLSCert, TLSKey, Issuers, Snapshot                                                  string
	Public                                                                              bool
	Redistribute                                                                        bundle.Redistribution
	CreateOnly                                                                          []string
	ReserveMB, BuildsPerHour, CallsPerMinute, Quarantine, KeepBuilds, KeepLogs          int
	VerifyMB                                                                            int // per second
	DiscoverEvery, Grace                                                                time.Duration
}

// dataPaths sets the defaults of the data folder and of the two databases.
func (s *settings) dataPaths() error {
	if s.Data == "" {
		dir, err := stateDir()
		if err != nil {
			return err
		}
		s.Data = dir
	}
	var err error
	if s.Data, err = filepath.Abs(s.Data); err != nil {
		return fault.Wrap(fault.Usage, fmt.Errorf("find the data folder: %w", err), "give --data as an absolute path")
	}
	if s.Database == "" {
		s.Database = "sqlite://" + filepath.Join(s.Data, "catalogue.db")
	}
	if s.Queue == "" {
		s.Queue = s.Database
		if strings.HasPrefix(s.Database, "sqlite://") {
			// The queue has its own file, so that the catalogue does not wait for the builders' writes.
			s.Queue = "sqlite://" + filepath.Join(s.Data, "queue.db")
		}
	}
	return nil
}

// complete sets the defaults that depend on other settings, and checks all settings.
func (s *settings) complete() error {
	if err := s.dataPaths(); err != nil {
		return err
	}
	var wrong []error
	add := func(flag, text, hint string, also ...string) {
		wrong = append(wrong, cli.About(fault.New(fault.Usage, text, hint), append([]string{flag}, also...)...))
	}
	for _, pattern := range s.CreateOnly {
		if _, err := path.Match(pattern, ""); err != nil {
			add("create-only", fmt.Sprintf("--create-only %q: %v", pattern, err), "write a pattern such as prebake/*")
		}
	}
	if s.GKEMap != "" && s.KernelMirror == "" {
		add("gke-map", "--gke-map is given without --kernel-mirror, but the server looks up GKE's kernels in that mirror",
			"give --kernel-mirror URL too", "kernel-mirror")
	}
	if (s.TLSCert == "") != (s.TLSKey == "") {
		add("tls-cert", "only one of the flags --tls-cert and --tls-key is given", "give both flags, or neither",
			"tls-key")
	}
	if s.PublicRepository == "" {
		add("public-repository", "--public-repository is empty",
			"give --public-repository a path on this server such as /prebake/driver, or a repository of another registry")
	}
	return errors.Join(wrong...)
}

func stateDir() (string, error) {
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "prebake"), nil
	}
	if os.Geteuid() == 0 {
		return "/var/lib/prebake", nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fault.Wrap(fault.Usage, fmt.Errorf("choose the data folder: %w", err), "give --data FOLDER")
	}
	return filepath.Join(home, ".local/state/prebake"), nil
}

// serve opens the parts one after the other, runs them, and closes them in the opposite order.
func serve(ctx context.Context, s settings, log *slog.Logger) (err error) {
	closing := func(what string, f func() error) {
		if cerr := f(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("close %s: %w", what, cerr))
		}
	}
	if os.Getenv("GOGC") == "" {
		// The heap is small, so it may triple before the next garbage collection; Go's default is to double. Fewer
		// collections mean fewer slow calls.
		debug.SetGCPercent(200)
	}
	if err := os.MkdirAll(s.Data, 0o750); err != nil {
		return fault.Wrap(
			fault.Usage,
			fmt.Errorf("make the data folder: %w", err),
			"give --data a folder that this user may write to",
		)
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer closing("locks", unlock)
	token, err := loadToken(s, log)
	if err != nil {
		return err
	}
	var issuers *auth.Issuers
	if s.Issuers != "" {
		if issuers, err = auth.ReadIssuers(s.Issuers); err != nil {
			return err
		}
	}
	var secure *certificate
	if s.TLSCert != "" {
		if secure, err = openCertificate(s.TLSCert, s.TLSKey, log); err != nil {
			return err
		}
	}
	var list http.Handler
	if s.Snapshot != "" {
		if list, err = snapshotFiles(s.Snapshot); err != nil {
			return err
		}
	}
	db, err := store.OpenLogged(ctx, s.Database, log)
	if err != nil {
		return err
	}
	defer closing("catalogue", db.Close)
	q, err := queue.Open(ctx, s.Queue)
	if err != nil {
		return err
	}
	defer closing("queue", q.Close)
	if err := skipQueued(ctx, s, db, q, log); err != nil {
		return err
	}
	logs, err := store.OpenLogs(filepath.Join(s.Data, "logs"))
	if err != nil {
		return err
	}
	defer closing("logs", logs.Close)
	room := &disk{dir: s.Data, reserve: uint64(s.ReserveMB) << 20}
	logs.CheckFree = room.CheckFree
	var cat *catalogue.Catalogue
	registry, err := ocistore.Open(filepath.Join(s.Data, "registry"), ocistore.Options{
		CreateOnly: s.createOnly, CheckFree: room.CheckFree, Public: s.Public, Redistribute: s.Redistribute, Log: log,
		Forget: func(repo string, d digest.Digest) error {
			return cat.Forget(context.WithoutCancel(ctx), repo, string(d))
		},
	})
	if err != nil {
		return err
	}
	defer closing("registry", registry.Close)
	var within func(*store.Tx) catalogue.Enqueuer
	if s.Queue == s.Database {
		within = func(tx *store.Tx) catalogue.Enqueuer { return q.Within(tx.Conn, tx.Tx) }
	}
	cat = catalogue.New(catalogue.Config{
		Store: db, Logs: logs, Queue: q, Within: within, Repository: s.PublicRepository, HasManifest: registry.HasManifest,
		KernelMirror: s.KernelMirror, DriverMirror: s.DriverMirror, Quarantine: s.Quarantine, Log: log,
		FreeDeletedTags: registry.FreeTags, Public: s.Public, Redistribute: s.Redistribute,
	})
	cat.PlanSoon() // the former process may have stopped before it planned
	if s.KernelMirror != "" {
		cat.Mirror = discover.Mirror{URL: s.KernelMirror}
	}
	pages, err := web.New(web.Config{Catalogue: cat, Registry: registry, Log: log})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return fault.Wrap(fault.Busy, fmt.Errorf("listen: %w", err),
			"give --listen a free address; with port 0, the server takes any free port")
	}
	address := listener.Addr().String()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), listener.Close())
	}
	who := auth.New(auth.Config{First: token, Tokens: db, Issuers: issuers, Log: log})
	handler := httpapi.New(httpapi.Config{
		Catalogue: cat, Store: db, Queue: q, Disk: room, Free: room.Free, Damaged: registry.Damaged, Port: port,
		Version: version, Log: log,
		Stopping: ctx.Done(),
		Auth:     who, Access: db, BuildsPerHour: s.BuildsPerHour, CallsPerMinute: s.CallsPerMinute,
		Registry: ocistore.Handler(registry, who, log), Pages: pages, PageRoutes: web.Routes, Snapshot: list,
	})
	// The file gets its name only when it is complete, because a program may wait for it.
	addressFile := filepath.Join(s.Data, "address")
	scheme := "http"
	if secure != nil {
		scheme = "https"
	}
	if err := os.WriteFile(addressFile+".new", []byte(scheme+"://"+address+"\n"), 0o644); err != nil {
		return errors.Join(fmt.Errorf("write address file: %w", err), listener.Close())
	}
	if err := os.Rename(addressFile+".new", addressFile); err != nil {
		return errors.Join(fmt.Errorf("write address file: %w", err), listener.Close())
	}
	defer closing("address", func() error { return os.Remove(addressFile) })

	group, running := errgroup.WithContext(ctx)
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	if secure != nil {
		server.TLSConfig = &tls.Config{GetCertificate: secure.get, MinVersion: tls.VersionTLS12}
	}
	group.Go(func() error {
		run := server.Serve
		if secure != nil {
			run = func(l net.Listener) error { return server.ServeTLS(l, "", "") }
		}
		if err := run(listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		sweeper := &jobs.Sweeper{Catalogue: cat, Queue: q, Log: log}
		return sweeper.Run(running)
	})
	group.Go(func() error {
		return discover.Run(running, discover.Config{Sources: s.sources(), Every: s.DiscoverEvery, Catalogue: cat,
			Found: func(context.Context) { cat.PlanSoon() }, Log: log})
	})
	group.Go(func() error { return cat.Planner(running) })
	group.Go(func() error { return cat.LookUpUnknown(running) })
	group.Go(func() error { return cat.Measurer(running) })
	group.Go(func() error { return collect(running, registry, log) })
	group.Go(func() error { return verify(running, registry, int64(s.VerifyMB)<<20, log) })
	group.Go(func() error {
		<-running.Done()
		// First accept no new requests. After the grace period, close the connections of requests that still run.
		log.Info("server stopping", "grace", s.Grace)
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.Grace)
		defer cancel()
		if err := server.Shutdown(patience); err != nil {
			return server.Close()
		}
		return nil
	})
	group.Go(func() error {
		keep := retention{builds: time.Duration(s.KeepBuilds) * day, logs: time.Duration(s.KeepLogs) * day}
		return trim(running, db, logs, keep, log)
	})
	log.Info("server ready", "url", scheme+"://"+address, "data", s.Data, "version", version)
	return group.Wait()
}

// skipQueued keeps new builds from getting a number for which the queue has a job already. That would happen after an
// older catalogue was restored and the queue was not. The queue would then keep the older job of that number, and a
// builder would build the wrong cell.
func skipQueued(ctx context.Context, s settings, db *store.Store, q *queue.Queue, log *slog.Logger) error {
	if s.Queue == s.Database {
		return nil // a build and its job are written in one transaction
	}
	newest, err := q.Newest(ctx)
	if err != nil || newest == 0 {
		return err
	}
	skipped, err := db.SkipBuilds(ctx, newest)
	if err != nil {
		return err
	}
	if skipped {
		log.Warn("build numbers skipped: the queue is newer than the catalogue", "build", newest)
	}
	return nil
}

// sources returns the places that discovery reads.
func (s settings) sources() (all []discover.Source) {
	if s.KernelMirror != "" {
		all = append(all, discover.Kernels{URL: s.KernelMirror})
	}
	if s.DriverMirror != "" {
		all = append(all, discover.Drivers{URL: s.DriverMirror})
	}
	if s.GKEMap != "" { // last, because it may look up thousands of COS builds
		all = append(all, &discover.GKE{Map: s.GKEMap, URL: s.KernelMirror})
	}
	return all
}

// createOnly reports whether a tag is protected: it refers to the same digest for ever.
func (s settings) createOnly(repo, tag string) bool {
	chosen := slices.ContainsFunc(s.CreateOnly, func(pattern string) bool {
		ok, err := path.Match(pattern, repo)
		return ok && err == nil
	})
	return chosen && !listTag.MatchString(tag)
}
