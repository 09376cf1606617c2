package cas

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// The hint for another user's cache does not depend on the user of the test: root is never denied.
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
