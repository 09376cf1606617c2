package modcheck

import (
	"strings"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/target"
)

// vermagicOf returns the vermagic of a kernel with this configuration, or "" if the configuration does not determine
// it. The order comes from include/linux/vermagic.h.
func vermagicOf(config kconfig.Config, release string, arch target.Arch) string {
	if config.On("CONFIG_RANDSTRUCT") || config.On("CONFIG_GCC_PLUGIN_RANDSTRUCT") {
		return "" // the vermagic ends in a hash of a random seed, which the configuration does not have
	}
	words := []string{release}
	add := func(word string, options ...string) {
		for _, o := range options {
			if config.On(o) {
				words = append(words, word)
				return
			}
		}
	}
	add("SMP", "CONFIG_SMP")
	switch { // vermagic.h checks PREEMPT_BUILD since Linux 5.16, and PREEMPT before
	case config.On("CONFIG_PREEMPT_BUILD") || config.On("CONFIG_PREEMPT"):
		words = append(words, "preempt")
	case config.On("CONFIG_PREEMPT_RT"):
		words = append(words, "preempt_rt")
	}
	add("mod_unload", "CONFIG_MODULE_UNLOAD")
	add("modversions", "CONFIG_MODVERSIONS")
	if arch == target.ARM64 {
		words = append(words, "aarch64")
	}
	return strings.Join(words, " ")
}
