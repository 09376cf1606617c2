package bundle

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"sort"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/fault"
)

// Bounds on one layer, against hostile layers. The user space of a release has about 600 MB in 300 entries.
const (
	maxEntries = 20_000
	maxBytes   = 4 << 30 // uncompressed, tar headers included
	maxName    = 512
	windowSize = 8 << 20 // zstd's largest window for unpacking; it bounds the memory of unpacking
)

// PackRecipe is the recipe for new layers: the version of the code that packs them. A change of that code needs a new
// recipe if equal input would then give other bytes. Keep the earlier recipes, because the tags of published artifacts
// allow no other bytes.
const PackRecipe = "tar-zstd-2"

// packWindow returns zstd's window in bytes for a recipe. ok is false if this program does not know the recipe.
func packWindow(recipe string) (size int, ok bool) {
	switch recipe {
	case PackRecipe:
		return 4 << 20, true // 8 MiB would save 1.5 % of a user-space layer
	case "tar-zstd-1":
		return 8 << 20, true
	}
	return 0, false
}

// PackRecipes returns all recipes of [PackLayerAs], the newest first.
func PackRecipes() []string { return []string{PackRecipe, "tar-zstd-1"} }

// Layer is one packed layer on disk.
type Layer struct {
	Kind LayerKind
	// Path is the file with the compressed bytes.
	Path string
	// Digest is the digest of the compressed bytes. DiffID is the digest of the tar that was compressed.
	Digest, DiffID string
	// Size is the number of compressed bytes.
	Size int64
}

// entry is one name in a layer.
type entry struct {
	name string // slash-separated, without a trailing slash
	mode fs.FileMode
	size int64
	link string
}

// PackLayer writes srcDir as a compressed layer to dstFile. Equal trees give equal bytes on any machine: names are
// sorted, times are zero, owners are root, modes are 0644 or 0755, and one thread compresses. PackLayer refuses
// everything that [Unpack] would refuse.
func PackLayer(ctx context.Context, srcDir string, kind LayerKind, dstFile string) (Layer, error) {
	return PackLayerAs(ctx, PackRecipe, srcDir, kind, dstFile)
}

// PackLayerAs is [PackLayer] with the given recipe. With the recipe and the files of a published artifact, it writes
// the bytes of the artifact's layer again.
func PackLayerAs(ctx context.Context, recipe, srcDir string, kind LayerKind, dstFile string) (_ Layer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("pack %s layer: %w", kind, diskFull(err))
		}
	}()
	window, ok := packWindow(recipe)
	if !ok {
		return Layer{}, fault.New(fault.Unsupported, fmt.Sprintf("pack a layer: the recipe %q is unknown", recipe),
			"upgrade this program")
	}
	src, err := os.OpenRoot(srcDir)
	if err != nil {
		return Layer{}, err
	}
	defer src.Close()
	entries, err := listTree(src, kind)
	if err != nil {
		return Layer{}, err
	}

	out, err := os.Create(dstFile)
	if err != nil {
		return Layer{}, err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			err = errors.Join(err, os.Remove(dstFile))
		}
	}()
	packed := &countHash{w: out, h: sha256.New()}
	buffered := bufio.NewWriterSize(packed, 1<<20)
	// Compress with one thread, because the output must not depend on the number of processors.
	zw, err := zstd.NewWriter(buffered, zstd.WithEncoderLevel(zstd.SpeedBetterCompression),
		zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window), zstd.WithEncoderCRC(true))
	if err != nil {
		return Layer{}, err
	}
	diff := &countHash{w: zw, h: sha256.New()}
	if err := writeTar(ctx, diff, entries, func(e entry) (io.ReadCloser, error) { return src.Open(e.name) }); err != nil {
		return Layer{}, err
	}
	if err := zw.Close(); err != nil {
		return Layer{}, err
	}
	if err := buffered.Flush(); err != nil {
		return Layer{}, err
	}
	return Layer{Kind: kind, Path: dstFile, Digest: packed.digest(), DiffID: diff.digest(), Size: packed.n}, nil
}

// listTree returns all entries below the root in byte order of their names. So a folder comes before its content.
func listTree(src *os.Root, kind LayerKind) ([]entry, error) {
	var entries []entry
	var total int64
	err := fs.WalkDir(src.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := entry{name: name, mode: info.Mode()}
		switch info.Mode().Type() {
		case 0:
			e.size = info.Size()
			total += e.size
		case fs.ModeDir:
		case fs.ModeSymlink:
			if e.link, err = src.Readlink(name); err != nil {
				return err
			}
			if err := checkLink(name, e.link); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s has file type %s; want a folder, regular file or link", name, info.Mode().Type())
		}
		if err := checkName(name); err != nil {
			return err
		}
		if err := checkPlace(kind, name, info.IsDir()); err != nil {
			return err
		}
		entries = append(entries, e)
		if len(entries) > maxEntries || total > maxBytes/2 {
			return fmt.Errorf("the layer has more than %d entries, or more than %d bytes", maxEntries, int64(maxBytes/2))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// Not slices.SortFunc, which adds 12 KB to each program.
	sort.Slice(entries, func(i, j int) bool { return entries[i].name < entries[j].name })
	return entries, nil
}

// checkPlace returns an error if a name does not belong to this kind of layer. The three kinds share no names, so all
// layers can be unpacked into one folder.
func checkPlace(kind LayerKind, name string, dir bool) error {
	top, rest, _ := strings.Cut(name, "/")
	ok := false
	switch kind {
	case LayerModules:
		ok = name == "drivers" && dir || top == "drivers" && !dir && !strings.Contains(rest, "/") &&
			strings.HasSuffix(rest, ".ko")
	case LayerFirmware:
		ok = top == "firmware"
	case LayerUserspace:
		ok = top != "drivers" && top != "firmware"
	}
	if !ok {
		return fmt.Errorf("%s does not belong in a layer of kind %q", name, kind)
	}
	return nil
}

// writeTar writes entries as an archive. It calls open for each regular file.
func writeTar(ctx context.Context, w io.Writer, entries []entry, open func(entry) (io.ReadCloser, error)) error {
	tw := tar.NewWriter(w)
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		// Without the field Format, archive/tar writes USTAR, and adds PAX records only for values that do not fit.
		hdr := &tar.Header{Name: e.name, ModTime: time.Unix(0, 0), Mode: fileMode(e.mode)}
		switch e.mode.Type() {
		case fs.ModeDir:
			hdr.Typeflag, hdr.Name, hdr.Mode = tar.TypeDir, e.name+"/", 0o755
		case fs.ModeSymlink:
			hdr.Typeflag, hdr.Linkname, hdr.Mode = tar.TypeSymlink, e.link, 0o777
		default:
			hdr.Typeflag, hdr.Size = tar.TypeReg, e.size
		}
		if err := tw.WriteHeader(hdr); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		if hdr.Typeflag != tar.TypeReg {
			continue
		}
		if err := copyIn(ctx, tw, e, open); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	return tw.Close()
}

func copyIn(ctx context.Context, tw *tar.Writer, e entry, open func(entry) (io.ReadCloser, error)) error {
	f, err := open(e)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(tw, &ctxReader{ctx: ctx, r: f})
	if err == nil && n != e.size {
		err = fmt.Errorf("the file changed while it was read: it had %d bytes before, and has %d bytes now", e.size, n)
	}
	return err
}

func fileMode(m fs.FileMode) int64 {
	if m.Perm()&0o111 != 0 {
		return 0o755
	}
	return 0o644
}

// checkName accepts only clean relative names.
func checkName(name string) error {
	if name == "" || len(name) > maxName || name != path.Clean(name) || !fs.ValidPath(name) || name == "." ||
		strings.ContainsAny(name, "\x00\\\n\r") {
		return fmt.Errorf("name %.80q is not a clean relative path of at most %d bytes", name, maxName)
	}
	return nil
}

// checkLink accepts relative links that stay inside the tree. ".." is allowed only at the beginning of the target,
// where it leads to a real folder. A ".." after a name is refused, because the name could be another link.
func checkLink(name, link string) error {
	bad := func(why string) error { return fmt.Errorf("link %s -> %.80q %s", name, link, why) }
	if link == "" || len(link) > maxName || path.IsAbs(link) || strings.ContainsAny(link, "\x00\\\n\r") {
		return bad("is not a relative path")
	}
	if link != path.Clean(link) {
		return bad("is not a clean path")
	}
	if in := path.Join(path.Dir(name), link); in == ".." || strings.HasPrefix(in, "../") {
		return bad("leads out of the layer")
	}
	return nil
}

// countHash counts and hashes the bytes that it writes to w.
type countHash struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (c *countHash) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	c.h.Write(p[:n]) // a hash never returns an error
	return n, err
}

func (c *countHash) digest() string { return ocidigest.NewDigest(ocidigest.SHA256, c.h).String() }

// ctxReader stops reading when its context ends. It is used only during one call.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// diskFull adds the fault kind and a hint to an error of a full disk.
func diskFull(err error) error {
	return fault.Disk(err, "free space on the disk of the folder that this program writes to")
}
