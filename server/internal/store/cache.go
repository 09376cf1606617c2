package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/jackc/pgx/v5"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// Nodes ask the same few questions again and again, and each question costs a database some hundred microseconds. The
// cache therefore keeps the facts of a kernel's cells until somebody writes about that kernel. With SQLite, this
// process is the only writer. With PostgreSQL, each writer notifies the others by NOTIFY, in the transaction that
// writes. A process that receives no notifications caches nothing.

// Limits of the cache.
const (
	rememberedKernels = 8192
	rememberedDrivers = 4096
	// maxNotes is the most keys that one transaction announces. A transaction that changes more announces that
	// everything changed.
	maxNotes = 50
	channel  = "prebake_catalogue"
)

type cache struct {
	kernels *lru.Cache[string, *KernelCells]
	drivers *lru.Cache[string, api.DriverRelease]

	mu        sync.Mutex
	listening bool   // notifications of other writers arrive
	dropped   uint64 // how often entries were dropped
}

func newCache() *cache {
	kernels, err := lru.New[string, *KernelCells](rememberedKernels)
	drivers, derr := lru.New[string, api.DriverRelease](rememberedDrivers)
	if err := errors.Join(err, derr); err != nil {
		panic(err) // an error means that the size is not positive
	}
	return &cache{kernels: kernels, drivers: drivers}
}

// remember returns a cached value, or calls read and caches its result. It caches nothing if read says so. It also
// caches nothing if entries were dropped during the read, because the value may be older than the change.
func remember[T any](c *cache, in *lru.Cache[string, T], key string, read func() (T, bool, error)) (T, error) {
	if v, ok := in.Get(key); ok {
		return v, nil
	}
	c.mu.Lock()
	before, listening := c.dropped, c.listening
	c.mu.Unlock()
	v, keep, err := read()
	if err != nil || !keep || !listening {
		return v, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dropped == before && c.listening {
		in.Add(key, v)
	}
	return v, nil
}

// forget drops the entries of the kernels and drivers with these keys. The key "" drops everything.
func (c *cache) forget(keys ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropped++
	for _, key := range keys {
		if key == "" {
			c.kernels.Purge()
			c.drivers.Purge()
			return
		}
		c.kernels.Remove(key)
		c.drivers.Remove(key)
	}
}

// listens sets whether notifications of other writers arrive. It also drops everything.
func (c *cache) listens(yes bool) {
	c.mu.Lock()
	c.listening = yes
	c.mu.Unlock()
	c.forget("")
}

// KernelCells reads a kernel with the facts that decide the state of its cells. It returns nil if the catalogue lacks
// the kernel. The result may come from the cache.
func (s *Store) KernelCells(ctx context.Context, buildID, board string) (*KernelCells, error) {
	return remember(s.cache, s.cache.kernels, buildID+"/"+board, func() (*KernelCells, bool, error) {
		all, _, err := s.Cells(ctx, KernelFilter{BuildID: buildID, Board: board}, Page{Limit: 1})
		if err != nil || len(all) == 0 {
			return nil, false, err
		}
		return all[0], true, nil
	})
}

// RememberedCells lists a page of kernels with the facts about their cells, newest BUILD_ID first. It uses the cache if
// all of the page is cached. The facts about one kernel then come from one state of the database. The facts about two
// kernels may come from different states.
func (s *Store) RememberedCells(
	ctx context.Context,
	f KernelFilter,
	p Page,
) (all []*KernelCells, next string, err error) {
	text, args, err := f.page("build_id, board", p)
	if err != nil {
		return nil, "", err
	}
	var names [][2]string
	err = query(ctx, s.readers, func(row func(...any) error) error {
		var name [2]string
		err := row(&name[0], &name[1])
		names = append(names, name)
		return err
	}, text, args...)
	if err != nil {
		return nil, "", classify("list cells", err)
	}
	names, next = cut(names, p.Limit, func(n [2]string) []string { return []string{target.SortKey(n[0]), n[1]} })
	all = make([]*KernelCells, len(names))
	for i, n := range names {
		var ok bool
		if all[i], ok = s.cache.kernels.Get(n[0] + "/" + n[1]); !ok {
			return s.rememberPage(ctx, f, p)
		}
	}
	return all, next, nil
}

// rememberPage reads a page and caches it, unless entries were dropped during the read.
func (s *Store) rememberPage(ctx context.Context, f KernelFilter, p Page) (all []*KernelCells, next string, err error) {
	c := s.cache
	c.mu.Lock()
	before := c.dropped
	c.mu.Unlock()
	all, next, err = s.Cells(ctx, f, p)
	if err != nil {
		return nil, "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dropped == before && c.listening {
		for _, cells := range all {
			c.kernels.Add(cells.Kernel.String(), cells)
		}
	}
	return all, next, nil
}

// listen receives the notifications of other processes, until ctx is done.
func (s *Store) listen(ctx context.Context, url string) {
	pause := backoff.NewExponentialBackOff()
	pause.MaxInterval = 10 * time.Second
	for ctx.Err() == nil {
		err := s.listenOnce(ctx, url, pause.Reset)
		s.cache.listens(false)
		if err == nil || ctx.Err() != nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause.NextBackOff()):
		}
	}
}

// listenOnce listens on one connection until it breaks.
func (s *Store) listenOnce(ctx context.Context, url string, begun func()) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // the connection is not used again
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	s.cache.listens(true)
	begun()
	for {
		note, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		s.cache.forget(note.Payload)
	}
}

// touch notes that the transaction changes a kernel (BUILD_ID/BOARD) or a driver version. "" stands for everything.
func (tx *Tx) touch(key string) {
	if tx.touched == nil {
		tx.touched = map[string]bool{}
	}
	tx.touched[key] = true
}

// notes returns the keys that every cache has to drop after the transaction.
func (tx *Tx) notes() []string {
	if tx.touched[""] || len(tx.touched) > maxNotes {
		return []string{""}
	}
	var all []string
	for key := range tx.touched {
		all = append(all, key)
	}
	return all
}

// notify makes PostgreSQL send the keys to all servers when the transaction is committed.
func (tx *Tx) notify(ctx context.Context, notes []string) error {
	if !tx.postgres {
		return nil
	}
	for _, note := range notes {
		if _, err := tx.ExecContext(ctx, `SELECT pg_notify($1, $2)`, channel, note); err != nil {
			return fmt.Errorf("notify other servers: %w", err)
		}
	}
	return nil
}
