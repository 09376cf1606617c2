package modsign

import (
	"io"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
)

// Config is what a kernel's configuration says about module signatures.
type Config struct {
	// Checks says that the kernel knows them at all: without, it takes every
	// module and never examines a signature.
	Checks bool
	// Forced says that it refuses unsigned modules whatever its command line: it
	// was configured to, or to lock itself down when it boots.
	Forced bool
	// Hash is the one that its own modules are signed with.
	Hash string
}

// ReadConfig reads a kernel's .config.
func ReadConfig(r io.Reader) (Config, error) {
	options, err := kconfig.Read(r)
	if err != nil {
		return Config{}, err
	}
	c := Config{Checks: options.On("CONFIG_MODULE_SIG"), Hash: options.Text("CONFIG_MODULE_SIG_HASH")}
	for _, name := range []string{"CONFIG_MODULE_SIG_FORCE",
		"CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY", "CONFIG_LOCK_DOWN_KERNEL_FORCE_CONFIDENTIALITY"} {
		c.Forced = c.Forced || options.On(name)
	}
	if c.Checks && c.Hash == "" {
		return Config{}, fault.New(fault.CheckFailed,
			"read kernel configuration: CONFIG_MODULE_SIG without CONFIG_MODULE_SIG_HASH", "fetch the kernel's headers again")
	}
	c.Forced = c.Forced && c.Checks // without signatures there is nothing to refuse
	return c, nil
}
