package cas

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestOpenDenied checks the hint for a cache that belongs to another user. It calls denied itself: the test may run as
// root, to whom the kernel denies nothing.
func TestOpenDenied(t *testing.T) {
	t.Parallel()
	err := denied(fmt.Errorf("open cache: %w", fs.ErrPermission))
	if !fault.Is(err, fault.Usage) || fault.Hint(err) != hintOwner {
		t.Errorf("Open of another user's cache = %v, hint %q; want a hint about the owner", err, fault.Hint(err))
	}
	if other := denied(fs.ErrExist); !errors.Is(other, fs.ErrExist) {
		t.Errorf("another error = %v; want it unchanged", other)
	}
}
