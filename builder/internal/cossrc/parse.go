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

// Maximum sizes of the small text objects of a COS build, in bytes.
const (
	maxEnv    = 16 << 10
	maxHeader = 64 << 10
	maxInfo   = 4 << 10
	maxCommit = 1 << 10
)

var (
	envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)
	// envValue allows names of programs and flags, and no character that a shell or a makefile would expand.
	envValue = regexp.MustCompile(`^[A-Za-z0-9_+=:,./ -]*$`)
	// A kernel release is also the name of a folder in /lib/modules, so it must not contain a slash. It has at most 64
	// bytes (__NEW_UTS_LEN in linux/utsname.h), without the NUL byte.
	releasePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,63}$`)
	// sourcePattern accepts any scheme, because a mirror may have the source of another kernel than Google's.
	sourcePattern  = regexp.MustCompile(`^[a-z][a-z0-9+.-]{0,31}:[!-~]{1,500}$`)
	versionPattern = regexp.MustCompile(`^[ -~]{1,64}$`)
)

// ParseEnv parses toolchain_env: lines NAME=VALUE, with or without quotes. It skips blank lines.
func ParseEnv(text []byte) (map[string]string, error) {
	if len(text) > maxEnv {
		return nil, badEnv("the file has %d bytes; want at most %d bytes", len(text), maxEnv)
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
			return nil, badEnv("line %.100q is not NAME=VALUE, where VALUE has only letters, digits, blanks and _+=:,./-", line)
		}
		if old, ok := env[name]; ok && old != value {
			return nil, badEnv("%s is set twice, to different values", name)
		}
		env[name] = value
	}
	if env["CC"] == "" {
		return nil, badEnv("the file has no line CC=…")
	}
	return env, nil
}

func badEnv(format string, args ...any) error {
	return fault.New(fault.Unsupported, "read toolchain_env: "+fmt.Sprintf(format, args...),
		"write toolchain_env in the bucket again: it must have two lines, CC=… and CXX=…")
}

func unquote(s string) string {
	if len(s) >= 2 && (s[0] == '"' || s[0] == '\'') && s[len(s)-1] == s[0] {
		return s[1 : len(s)-1]
	}
	return s
}

// ParseInfo parses kernel_info and returns the URL of the kernel's source, from the line URL=….
func ParseInfo(text []byte) (string, error) {
	found := ""
	for line := range strings.Lines(string(text)) {
		value, ok := strings.CutPrefix(strings.TrimSpace(line), "URL=")
		if value = unquote(value); !ok || value == found {
			continue
		}
		if found != "" || !sourcePattern.MatchString(value) {
			return "", badInfo("the content %.100q has an invalid URL, or two URLs; want one line URL=…", text)
		}
		found = value
	}
	if found == "" {
		return "", badInfo("the content %.100q has no line URL=…", text)
	}
	return found, nil
}

func badInfo(format string, args ...any) error {
	return fault.New(fault.Unsupported, "read kernel_info: "+fmt.Sprintf(format, args...),
		"write the line URL=https://cos.googlesource.com/third_party/kernel into kernel_info in the bucket; or remove "+
			"kernel_info, because builds do not need it")
}

const hintHeaders = "put the complete kernel-headers.tgz of the COS build into the bucket"

// readRelease returns what `uname -r` and `uname -v` print on the kernel of a header tree. Without UTS_RELEASE in
// utsrelease.h, it reads kernel.release. Without UTS_VERSION, the version is "".
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
			hintHeaders)
	}
	// Newer kernels have UTS_VERSION in a separate header, utsversion.h.
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
			fmt.Sprintf("read kernel headers: UTS_VERSION %.80q is longer than 64 bytes, or has unprintable characters",
				version), hintHeaders)
	}
	return release, version, nil
}

// readDefine returns a string macro of a header, or "" if the header or the macro is missing.
func readDefine(dir, name, macro string) (string, error) {
	text, err := readHead(dir, name, maxHeader)
	if err != nil {
		return "", err
	}
	value, err := parseDefine(text, macro)
	if err != nil {
		return "", fault.Wrap(fault.Unsupported, fmt.Errorf("read %s: %w", path.Base(name), err), hintHeaders)
	}
	return value, nil
}

// parseDefine returns the value of the first line `#define MACRO "value"`, or "" if the text has no such line.
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
			return "", fmt.Errorf("the macro %s is %.80q; want a string in quotes", macro, rest)
		}
		return value, nil
	}
	return "", lines.Err()
}

// readHead reads the beginning of a file in the tree, up to a limit in bytes. It returns nil if the file is missing.
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
