package store_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
)

// TestManyFirstReaders lets many callers read a store that was just opened. If each connection is in a transaction, no
// connection is left to prepare a statement. In an earlier release, the callers then waited for ever.
func TestManyFirstReaders(t *testing.T) {
	t.Parallel()
	for range 5 {
		s := open(t, "sqlite://"+filepath.Join(t.TempDir(), "catalogue.db"))
		var done sync.WaitGroup
		begin := make(chan struct{})
		for i := range 64 {
			done.Go(func() {
				<-begin
				if _, err := s.KernelCells(t.Context(), fmt.Sprintf("1.2.%d", i), "lakitu"); err != nil {
					t.Errorf("KernelCells() = %v", err)
				}
			})
		}
		close(begin)
		done.Wait()
	}
}
