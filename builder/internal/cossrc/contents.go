package cossrc

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/input"
	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/target"
)

// Contents describes what an archive of a COS build contains. It is for people who must find out why [Fetch] refused
// the archive, so nothing in it is checked.
type Contents struct {
	Material Material
	Format   archive.Format
	// Entries is the number of entries that could be read.
	Entries int
	// Folders are the folders near the archive's root: as many levels as fit into maxFolders names.
	Folders []string
	// Programs are the paths of compilers and linkers.
	Programs []string
	// Files are the paths of the files that [Fetch] reads from the header tree: .config, Module.symvers and
	// utsrelease.h.
	Files []string
	// Config is the content of the first .config, or nil. Release is UTS_RELEASE of the first utsrelease.h, or "".
	Config  []byte
	Release string
}

// Maximum numbers of names in Contents, and of names that are remembered while an archive is read.
const (
	maxFolders  = 24
	maxPrograms = 24
	maxFiles    = 8
	maxSeen     = 10_000
	maxName     = 4096 // bytes, as Linux's PATH_MAX
)

// HeadersContents fetches the header archive of a COS build into the cache and reads it without unpacking it. After an
// error, the result has what was read before.
func HeadersContents(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, kernel target.Kernel,
	say func(string)) (Contents, error) {
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, bucket: b, kernel: kernel}
	p, err := f.fetchFile(ctx, cosbucket.HeadersName(kernel))
	if err != nil {
		return Contents{}, err
	}
	return readContents(ctx, p, headersLimits)
}

// ToolchainContents is like [HeadersContents] for the toolchain, which may be in another bucket.
func ToolchainContents(ctx context.Context, b *cosbucket.Bucket, cache *cas.Cache, kernel target.Kernel,
	say func(string)) (Contents, error) {
	f := &fetcher{Fetcher: input.Fetcher{Source: b, Cache: cache, Progress: say}, bucket: b, kernel: kernel}
	p, err := f.toolchain(ctx, getFile)
	if err != nil {
		return Contents{}, err
	}
	return readContents(ctx, p, withXZ(toolchainLimits))
}

func readContents(ctx context.Context, p part, o archive.Options) (Contents, error) {
	c := Contents{Material: p.material}
	f, err := os.Open(p.at)
	if err != nil {
		return c, err
	}
	defer f.Close()
	src, format, err := archive.Decompress(ctx, f, o.XZTool)
	if err != nil {
		return c, fmt.Errorf("read %s: %w", p.material.Name, err)
	}
	c.Format = format
	err = c.read(ctx, tar.NewReader(io.LimitReader(src, o.Bytes)), o.Entries)
	// After an error the decoder has stopped in the middle, so the error of Close adds nothing.
	if cerr := src.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		err = fmt.Errorf("read %s after %d entries: %w", p.material.Name, c.Entries, err)
	}
	return c, err
}

// programName matches the names of compilers and linkers, with or without a prefix for the target.
var programName = regexp.MustCompile(`^(?:.*-)?(?:clang|gcc|ld|ld\.lld|ld\.bfd)$`)

func (c *Contents) read(ctx context.Context, in *tar.Reader, limit int) error {
	seen := map[string]bool{}
	defer func() { c.Folders = topFolders(seen) }()
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if c.Entries++; c.Entries > limit {
			return fmt.Errorf("the archive has more than %d entries", limit)
		}
		if len(h.Name) > maxName {
			return fmt.Errorf("the archive has a name with %d bytes; want at most %d bytes", len(h.Name), maxName)
		}
		name := path.Clean(h.Name)
		folder := name
		if h.Typeflag != tar.TypeDir {
			folder = path.Dir(name)
		}
		if len(seen) < maxSeen {
			seen[cut(folder, maxLevels)] = true
		}
		if err := c.note(h, name, in); err != nil {
			return err
		}
	}
}

// note records one entry that is not a folder.
func (c *Contents) note(h *tar.Header, name string, body io.Reader) error {
	base := path.Base(name)
	link := h.Typeflag == tar.TypeSymlink || h.Typeflag == tar.TypeLink
	if h.Typeflag != tar.TypeReg && !link {
		return nil
	}
	if programName.MatchString(base) && len(c.Programs) < maxPrograms {
		c.Programs = append(c.Programs, name)
	}
	if !slices.Contains([]string{".config", "Module.symvers", "utsrelease.h"}, base) {
		return nil
	}
	if len(c.Files) < maxFiles {
		c.Files = append(c.Files, name)
	}
	if link || base == "Module.symvers" {
		return nil
	}
	text, err := io.ReadAll(io.LimitReader(body, kconfig.Max))
	if err != nil {
		return err
	}
	switch {
	case base == ".config" && c.Config == nil:
		c.Config = text
	case base == "utsrelease.h" && c.Release == "":
		// A utsrelease.h that cannot be parsed leaves Release empty. Files has its path in any case.
		c.Release, _ = parseDefine(text, "UTS_RELEASE")
	}
	return nil
}

// maxLevels is the depth of the deepest folder in Contents.Folders.
const maxLevels = 3

// cut returns the first levels of a path.
func cut(name string, levels int) string {
	parts := strings.SplitN(name, "/", levels+1)
	return strings.Join(parts[:min(len(parts), levels)], "/")
}

// topFolders returns the folders down to the deepest level, at most maxLevels, at which there are no more than
// maxFolders names. If the first level alone has more, topFolders returns its first maxFolders names.
func topFolders(seen map[string]bool) []string {
	for levels := maxLevels; ; levels-- {
		set := map[string]bool{}
		for name := range seen {
			set[cut(name, levels)] = true
		}
		for name := range maps.Clone(set) {
			for parent := path.Dir(name); parent != name; name, parent = parent, path.Dir(parent) {
				delete(set, parent) // the name of a folder below it says that it exists
			}
		}
		names := slices.Sorted(maps.Keys(set))
		if len(names) <= maxFolders || levels == 1 {
			return names[:min(len(names), maxFolders)]
		}
	}
}
