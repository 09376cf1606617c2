// Package kconfig reads a kernel's configuration, the .config in its headers. It does not interpret options.
package kconfig

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Max is the maximum size of a configuration in bytes. A configuration with every option of a kernel has 300 KB.
const Max = 4 << 20

// Config maps the name of each option that is set, with CONFIG_, to the text in the file: y, m, a number, or a quoted
// string.
type Config map[string]string

const (
	hintLacking = "put a kernel-headers.tgz with the kernel's .config into the bucket"
	hintBroken  = "put a kernel-headers.tgz with the undamaged .config of the kernel into the bucket"
)

// ReadFile reads a configuration by its path.
func ReadFile(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(fault.InputMissing, fmt.Errorf("read kernel configuration: %w", err), hintLacking)
	}
	defer f.Close() // the file is only read, so an error of Close loses nothing
	return Read(f)
}

// Read reads a configuration of at most Max bytes.
func Read(r io.Reader) (Config, error) {
	text, err := io.ReadAll(io.LimitReader(r, Max+1))
	if err != nil {
		return nil, fmt.Errorf("read kernel configuration: %w", err)
	}
	return Parse(text)
}

// Parse reads the lines that set an option and skips all others. As in the kernel's own reader, the last line for an
// option counts. A text larger than Max, or with a line of 64 KB or more, is an error.
func Parse(text []byte) (Config, error) {
	if len(text) > Max {
		err := fmt.Errorf("read kernel configuration: the text has more than %d MiB", Max>>20)
		return nil, fault.Wrap(fault.CheckFailed, err, hintBroken)
	}
	c := Config{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), "=")
		if ok && strings.HasPrefix(name, "CONFIG_") {
			c[name] = value
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fault.Wrap(fault.CheckFailed, fmt.Errorf("read kernel configuration: %w", err), hintBroken)
	}
	return c, nil
}

// On reports whether an option is set to y.
func (c Config) On(name string) bool { return c[name] == "y" }

// Text returns an option's value without the quotes of a string.
func (c Config) Text(name string) string { return strings.Trim(c[name], `"`) }
