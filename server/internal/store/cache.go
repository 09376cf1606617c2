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
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
)

// The cache keeps the facts about a kernel's cells until somebody changes them. With SQLite, this process is the only
// writer. With PostgreSQL, each writing transaction sends a NOTIFY to the other processes. A process that cannot
// receive notifications caches nothing.

// rememberedKernels and rememberedDrivers are the maximum numbers of cached entries.
const (
	rememberedKernels = 8192
	rememberedDrivers = 4096
	// maxNotes is the maximum number of changed keys that a transaction sends to other processes. If more have changed,
	// it sends one notification for everything.
	maxNotes = 50
	channel  = "prebake_catalogue"
)

type cache struct {
	kernels *lru.Cache[string, *KernelCells]
	drivers *lru.Cache[string, api.DriverRelease]

	mu        sync.Mutex
	listening bool   // true if notifications of other writers arrive
	dropped   uint64 // number of calls of forget
}

func newCache() *cache {
	kernels, err := lru.New[string, *KernelCells](rememberedKernels)
	drivers, derr := lru.New[string, api.DriverRelease](rememberedDrivers)
	if err := errors.Join(err, derr); err != nil {
		panic(err) // an error means that the size is not positive
	}
	return &cache{kernels: kernels, drivers: drivers}
}

// remember returns a cached value. If no value is cached, remember calls read and caches its result. It does not cache
// the result if read returns false, or if entries were dropped meanwhile, because the result may then be out of date.
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

// forget drops the entries of kernels and drivers. The key "" stands for all entries.
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

// setListening stores whether notifications arrive, and drops all entries.
func (c *cache) setListening(yes bool) {
	c.mu.Lock()
	c.listening = yes
	c.mu.Unlock()
	c.forget("")
}

// KernelCells returns a kernel with the facts that decide the state of its cells. It returns nil if the catalogue lacks
// the kernel. The result may be cached.
func (s *Store) KernelCells(ctx context.Context, buildID, board string) (*KernelCells, error) {
	return remember(s.cache, s.cache.kernels, buildID+"/"+board, func() (*KernelCells, bool, error) {
		all, _, err := s.Cells(ctx, KernelFilter{BuildID: buildID, Board: board}, Page{Limit: 1})
		if err != nil || len(all) == 0 {
			return nil, false, err
		}
		return all[0], true, nil
	})
}

// RememberedCells lists a page of kernels with the facts about their cells, newest BUILD_ID first. If all kernels of
// the page are cached, the facts about two kernels may be of different moments.
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
		return nil, "", classify("list the cells", err)
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

// listen receives notifications from other processes, until ctx is done.
func (s *Store) listen(ctx context.Context, url string) {
	pause := backoff.NewExponentialBackOff()
	pause.MaxInterval = 10 * time.Second
	warned := false
	begun := func() {
		pause.Reset()
		warned = false
	}
	for ctx.Err() == nil {
		err := s.listenOnce(ctx, url, begun)
		s.cache.setListening(false)
		if err == nil || ctx.Err() != nil {
			return
		}
		if fault.Is(err, fault.Usage) && !warned {
			s.log.WarnContext(ctx, "notifications of the catalogue not received", "err", err, "hint", fault.Hint(err))
			warned = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause.NextBackOff()):
		}
	}
}

// listenOnce receives notifications until its connection breaks. It calls begun when it begins to listen.
func (s *Store) listenOnce(ctx context.Context, url string, begun func()) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // the connection is not used again
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	// Test that notifications arrive: without them, the cache would return old values for ever.
	err = queue.HearOwn(ctx, conn, func(ctx context.Context, payload string) error {
		_, err := s.db.ExecContext(ctx, `SELECT pg_notify($1, $2)`, channel, payload)
		return err
	})
	if err != nil {
		return err
	}
	s.cache.setListening(true)
	begun()
	for {
		note, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		s.cache.forget(note.Payload)
	}
}

// touch records that the transaction changes a kernel (BUILD_ID/BOARD), a driver version, or everything ("").
func (tx *Tx) touch(key string) {
	if tx.touched == nil {
		tx.touched = map[string]bool{}
	}
	tx.touched[key] = true
}

// notes returns the keys of the entries that every cache has to drop after the transaction.
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
