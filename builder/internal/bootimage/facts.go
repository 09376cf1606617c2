package bootimage

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/fault"
)

// Facts are the facts about a kernel that its vmlinux contains.
type Facts struct {
	// Banners are all texts in vmlinux that begin with "Linux version ". Linkers leave several of them, and the first may
	// be incomplete.
	Banners []string
	// BuildID is the GNU build id in hex, or "" if vmlinux has no build id.
	BuildID string
	// Config is the configuration that CONFIG_IKCONFIG put into the kernel, or nil.
	Config []byte
}

// Limits for the section .rodata, for one banner and for one generated header, in bytes.
const (
	maxSection = 256 << 20
	maxBanner  = 1024
	maxHeader  = 4 << 20
)

// kernel/configs.c puts configBegins and configEnds around the compressed configuration.
var (
	bannerBegins = []byte("Linux version ")
	configBegins = []byte("IKCFG_ST")
	configEnds   = []byte("IKCFG_ED")
)

const hintHeaders = "check that kernel-headers.tgz is the header archive of a COS build"

// ReadFacts reads the facts from a vmlinux. If the file is not a vmlinux, the error has the kind [fault.Unsupported].
func ReadFacts(vmlinux io.ReaderAt) (Facts, error) {
	var f Facts
	file, err := elf.NewFile(vmlinux)
	if err != nil {
		return f, badVMLinux("%v", err)
	}
	s := file.Section(".rodata")
	if s == nil || s.Type == elf.SHT_NOBITS || s.Size > maxSection {
		return f, badVMLinux("the section .rodata is missing, or has more than %d MiB", maxSection>>20)
	}
	text, err := s.Data()
	if err != nil {
		return f, badVMLinux("read the section .rodata: %v", err)
	}
	for rest := text; ; {
		i := bytes.Index(rest, bannerBegins)
		if i < 0 {
			break
		}
		rest = rest[i:]
		end := bytes.IndexByte(rest[:min(len(rest), maxBanner)], 0)
		if end < 0 {
			rest = rest[len(bannerBegins):]
			continue
		}
		f.Banners = append(f.Banners, strings.TrimRight(string(rest[:end]), "\n"))
		rest = rest[end:]
	}
	if len(f.Banners) == 0 {
		return f, badVMLinux("the section .rodata has no text that begins with %q", bannerBegins)
	}
	if _, packed, ok := bytes.Cut(text, configBegins); ok {
		if packed, _, ok = bytes.Cut(packed, configEnds); ok {
			if f.Config, err = unpackConfig(packed); err != nil {
				return f, badVMLinux("unpack the kernel's configuration in .rodata: %v", err)
			}
		}
	}
	f.BuildID = buildID(file)
	return f, nil
}

func unpackConfig(packed []byte) ([]byte, error) {
	zr, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(zr, kconfig.Max+1))
	if err == nil && len(text) > kconfig.Max {
		err = fmt.Errorf("the unpacked configuration has more than %d MiB", kconfig.Max>>20)
	}
	return text, errors.Join(err, zr.Close())
}

// buildID returns the GNU build id in hex, or "". The note has type 3 (NT_GNU_BUILD_ID in elf.h) and the name GNU.
func buildID(file *elf.File) string {
	s := file.Section(".note.gnu.build-id")
	if s == nil {
		s = file.Section(".notes")
	}
	if s == nil || s.Size > 1<<20 {
		return ""
	}
	note, err := s.Data()
	if err != nil {
		return ""
	}
	for len(note) >= 12 {
		name, size, kind := file.ByteOrder.Uint32(note), file.ByteOrder.Uint32(note[4:]), file.ByteOrder.Uint32(note[8:])
		at := 12 + (uint64(name)+3)&^3
		end := at + uint64(size)
		if end > uint64(len(note)) {
			return ""
		}
		if kind == 3 && string(note[12:12+name]) == "GNU\x00" {
			return hex.EncodeToString(note[at:end])
		}
		note = note[min(uint64(len(note)), (end+3)&^3):]
	}
	return ""
}

var definedString = regexp.MustCompile(`(?m)^#define[ \t]+(\w+)[ \t]+"([^"\n]*)"`)

// ErrOtherRun means that kernel and headers have the same release and configuration, but come from two runs of make.
// Callers may accept this, because a bucket may have an image and headers from different runs.
var ErrOtherRun = errors.New("vmlinux and the headers come from two runs of make")

// Check returns an error of kind [fault.Mismatch] if the kernel does not belong to a header tree. It compares:
//
//   - the releases;
//   - the configurations, if the kernel contains its own;
//   - who built the kernel, when, and under which build number, if the tree says so.
//
// If only the last facts differ, the error also wraps [ErrOtherRun].
func (f Facts) Check(headers string) error {
	said := map[string]string{}
	for _, name := range []string{"utsrelease.h", "utsversion.h", "compile.h"} {
		text, err := readBounded(filepath.Join(headers, "include", "generated", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		for _, m := range definedString.FindAllSubmatch(text, -1) {
			said[string(m[1])] = string(m[2])
		}
	}
	if said["UTS_RELEASE"] == "" {
		return fault.New(fault.Unsupported, "compare vmlinux with the headers: the headers have no UTS_RELEASE",
			"check that kernel-headers.tgz is the header archive of a COS build")
	}
	release := "Linux version " + said["UTS_RELEASE"] + " ("
	begins := release
	if by, host := said["LINUX_COMPILE_BY"], said["LINUX_COMPILE_HOST"]; by != "" && host != "" {
		begins += by + "@" + host + ")"
	}
	words := fmt.Errorf(
		"the version text in vmlinux is %.160q; the headers want a text that begins with %q and ends with %q",
		f.Banners[len(f.Banners)-1],
		begins,
		said["UTS_VERSION"])
	if !slices.ContainsFunc(f.Banners, func(banner string) bool { return strings.HasPrefix(banner, release) }) {
		return mismatch(words)
	}
	if err := f.checkConfig(headers); err != nil {
		return err
	}
	if !slices.ContainsFunc(f.Banners, func(banner string) bool {
		return strings.HasPrefix(banner, begins) && strings.HasSuffix(banner, said["UTS_VERSION"])
	}) {
		return mismatch(fmt.Errorf("%w: %w", ErrOtherRun, words))
	}
	return nil
}

func (f Facts) checkConfig(headers string) error {
	if f.Config == nil {
		return nil
	}
	inside, err := kconfig.Parse(f.Config)
	if err != nil {
		return mismatch(err)
	}
	outside, err := kconfig.ReadFile(filepath.Join(headers, ".config"))
	if err != nil {
		return err
	}
	if line := firstDifference(inside, outside); line != "" {
		return mismatch(errors.New("the configuration in vmlinux and the headers' .config differ at " + line))
	}
	return nil
}

func mismatch(why error) error {
	return fault.Wrap(fault.Mismatch, fmt.Errorf("vmlinux is not the kernel of this COS build: %w", why),
		"put into the bucket the vmlinux and the kernel-headers.tgz that one run of the command make produced; to publish "+
			"without a load test, add --load-test off")
}

// readBounded reads a header of at most maxHeader bytes.
func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxHeader+1))
	if err == nil && len(text) > maxHeader {
		err = fault.New(fault.Unsupported, fmt.Sprintf("read %s: the file has more than %d MiB", file, maxHeader>>20),
			hintHeaders)
	}
	return text, err
}

// firstDifference compares two configurations. It returns NAME=VALUE of the first option, by name, that differs, or ""
// if the configurations are equal.
func firstDifference(a, b kconfig.Config) string {
	var differ []string
	for _, pair := range [][2]kconfig.Config{{a, b}, {b, a}} {
		for name, value := range pair[0] {
			if other, ok := pair[1][name]; !ok || other != value {
				differ = append(differ, name+"="+value)
			}
		}
	}
	if len(differ) == 0 {
		return ""
	}
	return slices.Min(differ)
}
