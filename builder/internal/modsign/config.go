package modsign

import (
	"io"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
)

// Config says what a kernel's configuration decides about module signatures.
type Config struct {
	// Checks is true if the kernel supports module signatures. A kernel without this support loads every module.
	Checks bool
	// Forced is true if the configuration makes the kernel refuse unsigned modules, whatever the command line says.
	Forced bool
	// Hash is the hash algorithm with which the kernel's own modules are signed (CONFIG_MODULE_SIG_HASH).
	Hash string
}

// ReadConfig reads the options about module signatures from a kernel's .config.
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
			"read kernel configuration: CONFIG_MODULE_SIG is set, but CONFIG_MODULE_SIG_HASH is missing",
			"publish a kernel-headers.tgz with the undamaged .config of the kernel")
	}
	// A kernel without support for signatures cannot refuse a module.
	c.Forced = c.Forced && c.Checks
	return c, nil
}
