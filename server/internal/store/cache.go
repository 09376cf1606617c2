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

// A fleet asks the same few questions over and over, and each costs a database some
// hundred microseconds. So what decides about a kernel's cells is stored until
// something is written about that kernel. With SQLite, this process is the only one
// that writes. With PostgreSQL, writers tell each other by NOTIFY, in the transaction
// that writes; who does not receive them stores nothing.

// Bounds of what is stored.
const (
	rememberedKernels = 8192
	rememberedDrivers = 4096
	// maxNotes is how many kernels one transaction tells of by name.
	maxNotes = 50
	channel  = "prebake_catalogue"
)

// KernelCells is a kernel and what decides about all of its cells. It is shared:
// nobody may change it.
type KernelCells struct {
	Kernel api.Kernel
	Facts  map[CellKey]Facts
}

type cache struct {
	kernels *lru.Cache[string, *KernelCells]
	drivers *lru.Cache[string, api.DriverRelease]

	mu        sync.Mutex
	listening bool   // what is written elsewhere is heard
	dropped   uint64 // counts what was forgotten
}

func newCache() *cache {
	kernels, err := lru.New[string, *KernelCells](rememberedKernels)
	drivers, derr := lru.New[string, api.DriverRelease](rememberedDrivers)
	if err := errors.Join(err, derr); err != nil {
		panic(err) // of a size that is not positive
	}
	return &cache{kernels: kernels, drivers: drivers}
}

// remember reads something and keeps it, unless something was forgotten meanwhile:
// what was read may be older than that.
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

// forget drops what was written about; key "" is everything.
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

// listens says whether other writers are heard from now on.
func (c *cache) listens(yes bool) {
	c.mu.Lock()
	c.listening = yes
	c.mu.Unlock()
	c.forget("")
}

// KernelCells reads a kernel and what decides about its cells; nil when the
// catalogue does not know the kernel.
func (s *Store) KernelCells(ctx context.Context, buildID, board string) (*KernelCells, error) {
	return remember(s.cache, s.cache.kernels, buildID+"/"+board, func() (*KernelCells, bool, error) {
		all, facts, _, err := s.Cells(ctx, KernelFilter{BuildID: buildID, Board: board}, Page{Limit: 1})
		if err != nil || len(all) == 0 {
			return nil, false, err
		}
		return &KernelCells{all[0], facts}, true, nil
	})
}

// RememberedCells lists a page of kernels with what decides about their cells, newest
// BUILD_ID first, out of what is stored where it is. Each kernel is as one state
// of the database had it, the page as a whole need not be.
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

// rememberPage reads a page and keeps it, unless something was forgotten meanwhile.
func (s *Store) rememberPage(ctx context.Context, f KernelFilter, p Page) (all []*KernelCells, next string, err error) {
	c := s.cache
	c.mu.Lock()
	before := c.dropped
	c.mu.Unlock()
	kernels, facts, next, err := s.Cells(ctx, f, p)
	if err != nil {
		return nil, "", err
	}
	of := make(map[string]*KernelCells, len(kernels))
	for _, k := range kernels {
		all = append(all, &KernelCells{Kernel: k, Facts: map[CellKey]Facts{}})
		of[k.String()] = all[len(all)-1]
	}
	for key, fact := range facts {
		if cells := of[key.BuildID+"/"+key.Board]; cells != nil {
			cells.Facts[key] = fact
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dropped == before && c.listening {
		for name, cells := range of {
			c.kernels.Add(name, cells)
		}
	}
	return all, next, nil
}

// listen receives what other processes write, until ctx is done.
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

// listenOnce is one connection of listen.
func (s *Store) listenOnce(ctx context.Context, url string, begun func()) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // it is of no use any more
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

// touch notes that a transaction writes about a kernel (BUILD_ID/BOARD) or a driver
// version; "" means about more than that.
func (tx *Tx) touch(key string) {
	if tx.touched == nil {
		tx.touched = map[string]bool{}
	}
	tx.touched[key] = true
}

// notes returns what others have to forget once the transaction is over.
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

// notify has PostgreSQL tell all servers when the transaction is committed.
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
