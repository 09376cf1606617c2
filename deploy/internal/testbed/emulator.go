package testbed

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/deploy/internal/mirror"
	"github.com/prebake/prebake/pkg/fault"
)

// UseFastEmulator puts the qemu of the next Debian release first in PATH, for this process and its programs. If
// Debian's archive cannot be reached, the machine's own, slower qemu stays.
func (s *Scene) UseFastEmulator(ctx context.Context) error {
	bin, err := mirror.Emulator(ctx, filepath.Join(s.State, "packages"), func(line string) { fmt.Fprintln(s.Out, line) })
	if fault.Is(err, fault.Transient) {
		fmt.Fprintln(s.Out, "this machine's own emulator is used, because:", err)
		return nil
	}
	if err != nil {
		return err
	}
	return os.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
}
