package cossrc

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds of the small texts of a build.
const (
	maxEnv    = 16 << 10
	maxHeader = 64 << 10
	maxInfo   = 4 << 10
	maxCommit = 1 << 10
)

var (
	envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)
	// A value names a program or holds flags; whatever a shell would expand, or
	// a makefile, has no business there.
	envValue = regexp.MustCompile(`^[A-Za-z0-9_+=:,./ -]*$`)
	// A release is a folder name below /lib/modules (64 bytes of utsname, one
	// of them the end).
	releasePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,63}$`)
	// A source is a URL of any kind: mirrors that are not Google's name theirs.
	sourcePattern  = regexp.MustCompile(`^[a-z][a-z0-9+.-]{0,31}:[!-~]{1,500}$`)
	versionPattern = regexp.MustCompile(`^[ -~]{1,64}$`)
)

// ParseEnv reads toolchain_env: NAME=VALUE lines, as COS writes them, with or
// without quotes. Blank lines are skipped.
func ParseEnv(text []byte) (map[string]string, error) {
	if len(text) > maxEnv {
		return nil, badEnv("%d bytes; want at most %d", len(text), maxEnv)
	}
	env := map[string]string{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		value = unquote(strings.TrimSpace(value))
		if !ok || len(line) > 1024 || !envName.MatchString(name) || !envValue.MatchString(value) {
			return nil, badEnv("%.100q is not NAME=VALUE of plain characters", line)
		}
		if old, ok := env[name]; ok && old != value {
			return nil, badEnv("%s is set twice", name)
		}
		env[name] = value
	}
	if env["CC"] == "" {
		return nil, badEnv("no CC")
	}
	return env, nil
}

func badEnv(format string, args ...any) error {
	return fault.New(fault.Unsupported, "read toolchain_env: "+fmt.Sprintf(format, args...),
		"check the object in the bucket: COS's has two lines, CC=… and CXX=…")
}

func unquote(s string) string {
	if len(s) >= 2 && (s[0] == '"' || s[0] == '\'') && s[len(s)-1] == s[0] {
		return s[1 : len(s)-1]
	}
	return s
}

// ParseInfo reads kernel_info and returns where the kernel's source is: the line
// URL=….
func ParseInfo(text []byte) (string, error) {
	found := ""
	for line := range strings.Lines(string(text)) {
		value, ok := strings.CutPrefix(strings.TrimSpace(line), "URL=")
		if value = unquote(value); !ok || value == found {
			continue
		}
		if found != "" || !sourcePattern.MatchString(value) {
			return "", badInfo("%.100q is not one URL", text)
		}
		found = value
	}
	if found == "" {
		return "", badInfo("%.100q has no line URL=…", text)
	}
	return found, nil
}

func badInfo(format string, args ...any) error {
	return fault.New(fault.Unsupported, "read kernel_info: "+fmt.Sprintf(format, args...),
		"check the object in the bucket: COS's has the line URL=https://cos.googlesource.com/third_party/kernel; without "+
			"the object a build works too")
}

// readRelease returns what `uname -r` and `uname -v` print on the kernel of a
// header tree. The compiled kernel prints UTS_RELEASE; kernel.release is what
// kbuild made it from, and what trees without the header have.
func readRelease(dir string) (release, version string, err error) {
	generated := "include/generated/"
	if release, err = readDefine(dir, generated+"utsrelease.h", "UTS_RELEASE"); err != nil {
		return "", "", err
	}
	if release == "" {
		text, err := readHead(dir, "include/config/kernel.release", maxHeader)
		if err != nil {
			return "", "", err
		}
		release = strings.TrimSpace(string(text))
	}
	if !releasePattern.MatchString(release) {
		return "", "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel headers: %.80q in utsrelease.h or kernel.release is not a kernel release", release),
			"check that the header archive is complete")
	}
	// Newer kernels have the version in a header of its own.
	for _, name := range []string{"utsversion.h", "compile.h"} {
		if version, err = readDefine(dir, generated+name, "UTS_VERSION"); err != nil {
			return "", "", err
		}
		if version != "" {
			break
		}
	}
	if version != "" && !versionPattern.MatchString(version) {
		return "", "", fault.New(fault.Unsupported,
			fmt.Sprintf("read kernel headers: UTS_VERSION %.80q is not a version", version),
			"check that the header archive is complete")
	}
	return release, version, nil
}

// readDefine returns a string macro of a header; "" when either is missing.
func readDefine(dir, name, macro string) (string, error) {
	text, err := readHead(dir, name, maxHeader)
	if err != nil {
		return "", err
	}
	value, err := parseDefine(text, macro)
	if err != nil {
		return "", fault.Wrap(fault.Unsupported, fmt.Errorf("read %s: %w", path.Base(name), err),
			"check that the header archive is complete")
	}
	return value, nil
}

// parseDefine finds `#define MACRO "value"`; "" when there is none.
func parseDefine(text []byte, macro string) (string, error) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 || fields[0] != "#define" || fields[1] != macro {
			continue
		}
		_, rest, _ := strings.Cut(lines.Text(), macro)
		value, err := strconv.Unquote(strings.TrimSpace(rest))
		if err != nil {
			return "", fmt.Errorf("%s is not a string: %.80q", macro, rest)
		}
		return value, nil
	}
	return "", lines.Err()
}

// readHead reads the first bytes of a file of the tree; nothing when it is missing.
func readHead(dir, name string, limit int64) ([]byte, error) {
	f, err := os.OpenInRoot(dir, filepath.FromSlash(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}
