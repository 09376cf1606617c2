package store_test

import (
	"context"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/server/internal/store"
)

// testReadDuringWrite checks that reads do not wait for a write. In an earlier release, reads and writes shared one
// connection.
func testReadDuringWrite(t *testing.T, s *store.Store, id string) {
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	err := s.Write(ctx, func(tx *store.Tx) error {
		if err := tx.PutKernel(ctx, api.Kernel{Kernel: kernelOf(id), SeenAt: noon}); err != nil {
			return err
		}
		if err := s.Ping(ctx); err != nil {
			t.Errorf("Ping() beside a write = %v", err)
		}
		if _, err := s.KernelCells(ctx, id, "lakitu"); err != nil {
			t.Errorf("KernelCells() beside a write = %v", err)
		}
		if all, _, err := s.Kernels(ctx, store.KernelFilter{BuildID: id}, page); err != nil || len(all) != 0 {
			t.Errorf("Kernels() beside a write = %d, %v; want the state before the write", len(all), err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// testWriteThatPanics checks that another write is possible after one that panicked. There is only one connection for
// writes.
func testWriteThatPanics(t *testing.T, s *store.Store, id string) {
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	put := func(then func()) func(*store.Tx) error {
		return func(tx *store.Tx) error {
			err := tx.PutKernel(ctx, api.Kernel{Kernel: kernelOf(id), SeenAt: noon})
			then()
			return err
		}
	}
	done := make(chan any, 1)
	go func() {
		defer func() { done <- recover() }()
		_ = s.Write(ctx, put(func() { panic("bug") }))
	}()
	select {
	case got := <-done:
		if got != "bug" {
			t.Errorf("Write() of a bug panics with %v; want its own panic", got)
		}
	case <-ctx.Done():
		t.Fatal("Write() of a bug never ends; want a panic")
	}
	if _, known, err := s.Kernel(ctx, id, "lakitu"); known || err != nil {
		t.Errorf("Kernel() after a write that panicked = %v, %v; want none", known, err)
	}
	if err := s.Write(ctx, put(func() {})); err != nil {
		t.Errorf("Write() after one that panicked = %v", err)
	}
}
