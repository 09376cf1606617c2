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

// BootArgs is the file in a boot folder with arguments for the kernel's command line, separated by white space. The
// file is optional. COS's kernels need an argument that tells LoadPin which kinds of files it must not restrict.
const BootArgs = "cmdline"

// maxBootArgs is the maximum size of the file in bytes: the part of its command line that an amd64 kernel reads.
const maxBootArgs = 2048

// bootArgs reads the arguments from a boot folder's [BootArgs].
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
			fmt.Sprintf("read boot folder %s: %s has more than %d bytes", boot, BootArgs, maxBootArgs), "")
	}
	for _, arg := range strings.Fields(string(text)) {
		if strings.ContainsFunc(arg, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return nil, fault.New(fault.Usage,
				fmt.Sprintf("read boot folder %s: %s contains %q, which a kernel does not accept", boot, BootArgs, arg), "")
		}
		// The kernel passes everything after "--" to init, also the arguments that this package adds later.
		if arg == "--" {
			return nil, fault.New(fault.Usage, fmt.Sprintf("read boot folder %s: the file %s contains the word --", boot,
				BootArgs),
				"remove -- from the file")
		}
		args = append(args, arg)
	}
	return args, nil
}
