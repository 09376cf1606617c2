package reproduce

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/bundle"
)

// Difference describes one file that differs.
type Difference struct {
	// Name is the file's path in the artifact.
	Name string `json:"name"`
	// What describes the difference, for an ELF file by its differing sections.
	What string `json:"what"`
}

// compare compares each published layer with the new one. If their digests differ, compare unpacks both layers and
// compares their files. The results go to the report.
func (c Config) compare(ctx context.Context, content bundle.Content, made *pipeline.Made,
	folder func(string) (string, error), report *Report) error {
	theirs, err := folder("published")
	if err != nil {
		return err
	}
	ours, err := folder("again")
	if err != nil {
		return err
	}
	for _, layer := range made.Layers {
		published := content.Layer(layer.Kind)
		if published.Digest == layer.Digest {
			continue
		}
		blob, err := c.Repo.Blob(ctx, published.Digest, published.Size)
		if err != nil {
			return err
		}
		err = unpack(ctx, blob, published.Digest, published.DiffID, published.Size, theirs)
		if err := errors.Join(err, blob.Close()); err != nil {
			return fmt.Errorf("unpack the published %s layer: %w", layer.Kind, err)
		}
		file, err := os.Open(layer.Path)
		if err != nil {
			return err
		}
		err = unpack(ctx, file, layer.Digest, layer.DiffID, layer.Size, ours)
		if err := errors.Join(err, file.Close()); err != nil {
			return fmt.Errorf("unpack the new %s layer: %w", layer.Kind, err)
		}
	}
	report.Files, report.Differences, err = compareTrees(theirs, ours, report.ModuleKey != "")
	if err != nil {
		return err
	}
	// If a key signed the published modules, the digests differ even if all files are the same. Then only the facts in the
	// two configs must be equal.
	if len(report.Differences) == 0 && (report.ModuleKey == "" || content.Identity != made.Identity) {
		// All files are equal, but the digests of the artifacts differ.
		report.Differences = []Difference{{"(manifest)",
			fmt.Sprintf("all %d files are the same, but they are packed or described in another way", report.Files)}}
	}
	return nil
}

func unpack(ctx context.Context, r io.Reader, digest, diffID string, size int64, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	return errors.Join(bundle.Unpack(ctx, r, digest, diffID, size, root), root.Close())
}

// compareTrees compares two folders by name, kind, exec bit, link target and content. If the published modules are
// signed, their signatures are ignored.
func compareTrees(published, made string, signed bool) (files int, all []Difference, err error) {
	theirs, err := list(published)
	if err != nil {
		return 0, nil, err
	}
	ours, err := list(made)
	if err != nil {
		return 0, nil, err
	}
	names := maps.Clone(theirs)
	maps.Copy(names, ours)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		was, inTheirs := theirs[name]
		is, inOurs := ours[name]
		what := ""
		switch {
		case !inOurs:
			what = "only in the published artifact"
		case !inTheirs:
			what = "missing in the published artifact"
		case was != is:
			what = fmt.Sprintf("%s in the published artifact, %s in the rebuild", was, is)
		case was == regular || was == program:
			strip := signed && filepath.Ext(name) == ".ko"
			if what, err = compareFiles(filepath.Join(published, name), filepath.Join(made, name), strip); err != nil {
				return len(names), all, err
			}
		}
		if what != "" {
			all = append(all, Difference{name, what})
		}
	}
	return len(names), all, nil
}

// Kinds of entries. The kind of a link is "link to" and its target.
const (
	folderEntry = "folder"
	regular     = "file"
	program     = "program"
)

// list returns the kind of every entry below a folder, by path.
func list(dir string) (map[string]string, error) {
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		switch mode := info.Mode(); {
		case mode.IsDir():
			all[name] = folderEntry
		case mode&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			all[name] = "link to " + target
		case mode&0o111 != 0:
			all[name] = program
		default:
			all[name] = regular
		}
		return nil
	})
	return all, err
}

// compareFiles returns "" if the contents are equal, or else what differs: ELF sections, sizes, or the first byte. If
// strip is true, it ignores the signature at the end of the published module.
func compareFiles(published, made string, strip bool) (string, error) {
	a, err := os.ReadFile(published)
	if err != nil {
		return "", err
	}
	if strip {
		if a, _, err = modsign.Split(a); err != nil {
			// A malformed signature is a difference, not an error: the file is not as the provenance says.
			return err.Error(), nil
		}
	}
	b, err := os.ReadFile(made)
	if err != nil {
		return "", err
	}
	if bytes.Equal(a, b) {
		return "", nil
	}
	if where := elfDifference(a, b); where != "" {
		return where, nil
	}
	if len(a) != len(b) {
		return fmt.Sprintf("%d bytes in the published artifact, %d in the rebuild", len(a), len(b)), nil
	}
	at := 0
	for a[at] == b[at] {
		at++
	}
	return fmt.Sprintf("differs from byte %d on", at), nil
}

// elfDifference returns the names of the sections in which two ELF files differ. For other files, and for differences
// outside the sections, it returns "".
func elfDifference(published, made []byte) string {
	a, err := elf.NewFile(bytes.NewReader(published))
	if err != nil {
		return ""
	}
	b, err := elf.NewFile(bytes.NewReader(made))
	if err != nil {
		return ""
	}
	theirs, ours := sections(a), sections(b)
	names := maps.Clone(theirs)
	maps.Copy(names, ours)
	var differ []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !bytes.Equal(theirs[name], ours[name]) {
			differ = append(differ, name)
		}
	}
	const shown = 4
	switch n := len(differ); {
	case n == 0:
		return ""
	case n == 1:
		return "differs in section " + differ[0]
	case n <= shown:
		return "differs in sections " + strings.Join(differ, ", ")
	default:
		return fmt.Sprintf("differs in sections %s and %d more", strings.Join(differ[:shown], ", "), n-shown)
	}
}

// sections returns the contents of the sections by name; those with the same name are joined. An unreadable section
// counts as empty, because the files' bytes are compared anyway.
func sections(f *elf.File) map[string][]byte {
	all := map[string][]byte{}
	for _, s := range f.Sections {
		if s.Type == elf.SHT_NULL {
			continue
		}
		data, err := s.Data()
		if err != nil {
			data = nil
		}
		all[s.Name] = append(all[s.Name], data...)
	}
	return all
}
