package gate

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

const maxConfig = 4 << 20

// readConfig returns the options that a kernel configuration sets, strings
// without their quotes.
func readConfig(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(fault.InputMissing, fmt.Errorf("read kernel configuration: %w", err),
			"publish a kernel-headers.tgz that holds the kernel's .config")
	}
	defer f.Close() // only read
	text, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return nil, fmt.Errorf("read kernel configuration: %w", err)
	}
	return parseConfig(text), nil
}

func parseConfig(text []byte) map[string]string {
	set := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		name, value, ok := strings.Cut(lines.Text(), "=")
		if ok && strings.HasPrefix(name, "CONFIG_") {
			set[name] = strings.Trim(value, `"`)
		}
	}
	return set
}

// vermagicOf returns what a kernel of this configuration wants, in the order
// of include/linux/vermagic.h; "" where the configuration alone does not tell.
func vermagicOf(config map[string]string, release string, arch target.Arch) string {
	if config["CONFIG_RANDSTRUCT"] == "y" || config["CONFIG_GCC_PLUGIN_RANDSTRUCT"] == "y" {
		return "" // ends in a hash of the build's secret seed
	}
	words := []string{release}
	add := func(word string, options ...string) {
		for _, o := range options {
			if config[o] == "y" {
				words = append(words, word)
				return
			}
		}
	}
	add("SMP", "CONFIG_SMP")
	switch { // PREEMPT_BUILD is Linux 5.16's name for what decides here
	case config["CONFIG_PREEMPT_BUILD"] == "y" || config["CONFIG_PREEMPT"] == "y":
		words = append(words, "preempt")
	case config["CONFIG_PREEMPT_RT"] == "y":
		words = append(words, "preempt_rt")
	}
	add("mod_unload", "CONFIG_MODULE_UNLOAD")
	add("modversions", "CONFIG_MODVERSIONS")
	if arch == target.ARM64 {
		words = append(words, "aarch64")
	}
	return strings.Join(words, " ")
}
