package modsign

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Config is what a kernel's configuration says about module signatures.
type Config struct {
	// Checks says that the kernel knows them at all: without, it takes every
	// module and never looks at a signature.
	Checks bool
	// Forced says that it refuses unsigned modules whatever its command line: it
	// was configured to, or to lock itself down when it boots.
	Forced bool
	// Hash is the one that its own modules are signed with.
	Hash string
}

// maxConfig bounds a .config; a kernel with everything has 300 KB.
const maxConfig = 4 << 20

// ReadConfig reads a kernel's .config.
func ReadConfig(r io.Reader) (Config, error) {
	var c Config
	in := bufio.NewScanner(io.LimitReader(r, maxConfig))
	for in.Scan() {
		name, value, _ := strings.Cut(in.Text(), "=")
		switch name {
		case "CONFIG_MODULE_SIG":
			c.Checks = value == "y"
		case "CONFIG_MODULE_SIG_FORCE", "CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY", "CONFIG_LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY":
			c.Forced = c.Forced || value == "y"
		case "CONFIG_MODULE_SIG_HASH":
			c.Hash = strings.Trim(value, `"`)
		}
	}
	if err := in.Err(); err != nil {
		return Config{}, fault.Wrap(fault.CheckFailed, fmt.Errorf("read kernel configuration: %w", err), "")
	}
	if c.Checks && c.Hash == "" {
		return Config{}, fault.New(fault.CheckFailed, "read kernel configuration: CONFIG_MODULE_SIG without CONFIG_MODULE_SIG_HASH", "fetch the kernel's headers again")
	}
	c.Forced = c.Forced && c.Checks // without signatures there is nothing to refuse
	return c, nil
}
