package vm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// BootArgs is the file of a boot folder with what its kernel is started with,
// separated by white space: COS's kernels need to be told what LoadPin leaves
// alone. A folder without it asks for nothing.
const BootArgs = "cmdline"

// maxBootArgs is what a kernel reads of its whole command line on amd64.
const maxBootArgs = 2048

// bootArgs reads a boot folder's arguments.
func bootArgs(boot string) (args []string, err error) {
	f, err := os.Open(filepath.Join(boot, BootArgs))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	text, err := io.ReadAll(io.LimitReader(f, maxBootArgs+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxBootArgs {
		return nil, fault.New(fault.Usage,
			fmt.Sprintf("boot folder %s: %s has more than %d bytes", boot, BootArgs, maxBootArgs), "")
	}
	for _, arg := range strings.Fields(string(text)) {
		if strings.ContainsFunc(arg, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return nil, fault.New(fault.Usage,
				fmt.Sprintf("boot folder %s: %s holds %q, which no kernel takes", boot, BootArgs, arg), "")
		}
		// Everything after it would be init's, our own arguments among them.
		if arg == "--" {
			return nil, fault.New(fault.Usage, fmt.Sprintf("boot folder %s: %s holds --", boot, BootArgs), "leave it out")
		}
		args = append(args, arg)
	}
	return args, nil
}
