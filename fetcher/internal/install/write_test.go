package install_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// TestWriteFileAtOnce writes small files in several goroutines, as during a download, when the run and the check of the
// driver both write. Each file must have its own content.
func TestWriteFileAtOnce(t *testing.T) {
	t.Parallel()
	s := open(t)
	var wg sync.WaitGroup
	for i := range 4 {
		name, text := fmt.Sprintf(".prebake/%d.json", i), strings.Repeat(fmt.Sprint(i), 1000)
		wg.Go(func() {
			for range 50 {
				if err := s.WriteFile(name, []byte(text)); err != nil {
					t.Errorf("WriteFile(%s) = %v; want nil", name, err)
				}
				if raw, err := s.ReadFile(name); err != nil || string(raw) != text {
					t.Errorf("ReadFile(%s) = %.20q, %v; want %.20q", name, raw, err, text)
				}
			}
		})
	}
	wg.Wait()
}
