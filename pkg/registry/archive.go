package registry

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/fault"
)

// AnnotationBase marks the index of a layout as a delta, which leaves out the blobs of an earlier layout. The value is
// the digest of the earlier layout's index.json.
const AnnotationBase = "dev.prebake.bundle.base"

const (
	archivePrefix = "oci-archive:" // the same prefix as in skopeo and podman
	partsBetween  = "+"
	// maxEntries is the maximum number of entries of an archive: about 5,000 artifacts with their attestations.
	maxEntries = 1 << 18
	maxMarker  = 4 << 10
	markerFile = "oci-layout"
)

// archives reads an image layout from a sequence of tar files or folders. The last tar file or folder has the index.
type archives struct {
	paths []string

	mu    sync.Mutex
	parts []part // nil until load has read them
}

// part is one tar file or folder of [archives].
type part struct {
	path  string
	files map[string]extent // files in a tar; nil for a folder
	index string            // digest of index.json in this part
	base  string            // digest of the index.json of which this part is a delta; "" if this part is no delta
}

// extent is the position of a file's bytes in a tar.
type extent struct{ at, size int64 }

// openArchives parses FILE[+FILE…] and opens no file.
func openArchives(ref string) (*layoutStore, error) {
	paths := strings.Split(ref, partsBetween)
	if slices.Contains(paths, "") {
		return nil, errors.New("the reference names no file")
	}
	return &layoutStore{files: &archives{paths: paths}}, nil
}

func (*archives) cheapReads() bool  { return true }
func (*archives) allAttached() bool { return true }

func (a *archives) read(ctx context.Context, name string, limit int64) ([]byte, error) {
	parts, err := a.load(ctx)
	if err != nil {
		return nil, err
	}
	if name == indexFile {
		return parts[len(parts)-1].read(ctx, name, limit)
	}
	for _, p := range slices.Backward(parts) {
		raw, err := p.read(ctx, name, limit)
		if !errors.Is(err, fs.ErrNotExist) {
			return raw, err
		}
	}
	return nil, missing(parts, name)
}

func (a *archives) open(ctx context.Context, name string, size int64) (io.ReadCloser, error) {
	parts, err := a.load(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range slices.Backward(parts) {
		rc, err := p.open(ctx, name, size)
		if !errors.Is(err, fs.ErrNotExist) {
			return rc, err
		}
	}
	return nil, missing(parts, name)
}

// missing returns the error for a file that no part has. For a delta, it names the bundle that must come first.
func missing(parts []part, name string) error {
	first := parts[0]
	if first.base == "" {
		return &fs.PathError{Op: "open", Path: first.path + ":" + name, Err: fs.ErrNotExist}
	}
	return fault.New(
		fault.Usage,
		fmt.Sprintf(
			"%s is a delta, and does not contain %s; the bundle with index %s contains it",
			first.path,
			path.Base(name),
			first.base,
		),
		"write the file of that bundle before the delta: "+archivePrefix+"EARLIER.tar"+partsBetween+first.path,
	)
}

// load reads all parts once, and checks that each delta belongs to the part before it.
func (a *archives) load(ctx context.Context) ([]part, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.parts != nil {
		return a.parts, nil
	}
	var parts []part
	for i, file := range a.paths {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		p, err := readPart(ctx, file)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		if i > 0 && p.base != parts[i-1].index {
			return nil, notBasedOn(p, parts[i-1])
		}
		parts = append(parts, p)
	}
	a.parts = parts
	return parts, nil
}

func notBasedOn(p, before part) error {
	if p.base == "" {
		return fault.New(
			fault.Usage,
			p.path+" is a complete bundle, not a delta of "+before.path,
			"use the complete bundle alone: "+archivePrefix+p.path,
		)
	}
	return fault.New(
		fault.Usage,
		fmt.Sprintf(
			"%s is a delta of the bundle with index %s, but %s has index %s",
			p.path,
			p.base,
			before.path,
			before.index,
		),
		"write the bundle with that index before the delta; to see the index of a bundle: builder bundle show FILE",
	)
}

func readPart(ctx context.Context, file string) (part, error) {
	p := part{path: file}
	info, err := os.Stat(file)
	if err == nil && !info.IsDir() {
		p.files, err = scanFile(file)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Do not wrap fs.ErrNotExist: callers would treat a missing archive as an empty folder.
		return p, fault.New(
			fault.NotFound,
			"there is no such file",
			"use a file that \"builder bundle create\" made, or any tar of an OCI image layout",
		)
	case err != nil:
		return p, err
	}
	marker, err := p.read(ctx, markerFile, maxMarker)
	if err == nil {
		err = checkMarker(marker)
	}
	var index []byte
	if err == nil {
		index, err = p.read(ctx, indexFile, maxIndex)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return p, fault.New(
			fault.Unverified,
			"the archive lacks "+markerFile+" or "+indexFile,
			"use an uncompressed tar of an OCI image layout",
		)
	}
	if err != nil {
		return p, err
	}
	hash, _, err := v1.SHA256(bytes.NewReader(index))
	if err != nil {
		return p, err
	}
	p.index = hash.String()
	var idx v1.IndexManifest
	if err := json.Unmarshal(index, &idx); err != nil {
		return p, damaged(fmt.Errorf("read %s: %w", indexFile, err))
	}
	if p.base = idx.Annotations[AnnotationBase]; p.base != "" && checkDigest(p.base) != nil {
		return p, damaged(fmt.Errorf("annotation %s has the value %.100q; want a digest", AnnotationBase, p.base))
	}
	return p, nil
}

// checkMarker checks the version in the file oci-layout (image-spec 1.1, image-layout.md).
func checkMarker(raw []byte) error {
	var marker struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(raw, &marker); err != nil {
		return damaged(fmt.Errorf("read %s: %w", markerFile, err))
	}
	if marker.Version != "1.0.0" {
		return fault.New(
			fault.Unverified,
			fmt.Sprintf("the image layout has version %.20q; want version 1.0.0", marker.Version),
			"use a newer version of this program",
		)
	}
	return nil
}

func scanFile(file string) (map[string]extent, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return scan(f)
}

// layoutFile matches the names of a layout's files. An archive may have other files, which are ignored.
var layoutFile = regexp.MustCompile(`^(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})$`)

// scan returns the position of each file of a layout in a tar. It accepts only folders and regular files, and each file
// once.
func scan(r io.ReadSeeker) (map[string]extent, error) {
	size, err := r.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = r.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, err
	}
	files := map[string]extent{}
	t := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, refused(fmt.Sprintf("the file is not a tar: %v", err))
		}
		name, err := entryName(h)
		if err != nil {
			return nil, err
		}
		if n == maxEntries {
			return nil, refused(fmt.Sprintf("the archive has more than %d entries", maxEntries))
		}
		if h.Typeflag == tar.TypeDir || !layoutFile.MatchString(name) {
			continue
		}
		// The tar reader has read only the header, so the file's bytes begin here.
		at, err := r.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if h.Size < 0 || h.Size > size-at {
			return nil, refused(fmt.Sprintf("%s has %d bytes, but the archive ends before its last byte", name, h.Size))
		}
		if _, ok := files[name]; ok {
			return nil, refused(name + " is in the archive twice")
		}
		files[name] = extent{at, h.Size}
	}
}

// entryName returns the clean name of an entry. It refuses everything but a folder or a plain file inside the archive.
func entryName(h *tar.Header) (string, error) {
	if h.Typeflag != tar.TypeDir && h.Typeflag != tar.TypeReg {
		return "", refused(fmt.Sprintf("entry %.200q is neither file nor folder", h.Name))
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return "", refused(fmt.Sprintf("entry %.200q is a sparse file", h.Name))
		}
	}
	if path.IsAbs(h.Name) || strings.ContainsAny(h.Name, "\\\x00") || slices.Contains(strings.Split(h.Name, "/"), "..") {
		return "", refused(fmt.Sprintf("entry %.200q has a path outside of the archive", h.Name))
	}
	return path.Clean(h.Name), nil
}

func refused(what string) error {
	return fault.New(
		fault.Unverified,
		what,
		"get the file again from its publisher, and compare its SHA-256; the file must be an uncompressed tar",
	)
}

func (p part) read(ctx context.Context, name string, limit int64) ([]byte, error) {
	if p.files == nil {
		return folder(p.path).read(ctx, name, limit)
	}
	rc, err := p.open(ctx, name, limit)
	if err != nil {
		return nil, err
	}
	raw, err := readAll(rc, name, limit)
	return raw, errors.Join(err, rc.Close())
}

func (p part) open(ctx context.Context, name string, size int64) (io.ReadCloser, error) {
	if p.files == nil {
		return folder(p.path).open(ctx, name, size)
	}
	e, ok := p.files[name]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: p.path + ":" + name, Err: fs.ErrNotExist}
	}
	if e.size > size {
		return nil, damaged(fmt.Errorf("%s has %d bytes; want at most %d bytes", name, e.size, size))
	}
	f, err := os.Open(p.path)
	if err != nil {
		return nil, err
	}
	return section{io.NewSectionReader(f, e.at, e.size), f, e.size}, nil
}

// section is a region of n bytes of a file.
type section struct {
	io.Reader
	io.Closer
	n int64
}

// Layout gives access to the index and the blobs of an image layout, for code that copies them.
type Layout struct {
	r *Repository
	s *layoutStore
}

// AsLayout returns the layout of a repository. ok is false if the repository is on a registry.
func (r *Repository) AsLayout() (l Layout, ok bool) {
	s, ok := r.s.(*layoutStore)
	return Layout{r, s}, ok
}

// Index returns index.json and the digest of its bytes. A layout without index.json is an error.
func (l Layout) Index(ctx context.Context) (idx *v1.IndexManifest, digest string, err error) {
	raw, err := l.s.files.read(ctx, indexFile, maxIndex)
	idx = &v1.IndexManifest{}
	if err == nil {
		err = json.Unmarshal(raw, idx)
	}
	if err != nil {
		return nil, "", fmt.Errorf("read index of %s: %w", l.r.name, err)
	}
	hash, _, err := v1.SHA256(bytes.NewReader(raw))
	return idx, hash.String(), err
}

// Has reports whether the layout has this blob with exactly this size. It does not compare the digest. If a delta was
// opened alone, Has looks only in the delta.
func (l Layout) Has(ctx context.Context, d v1.Descriptor) (bool, error) {
	places := []interface {
		open(ctx context.Context, name string, size int64) (io.ReadCloser, error)
	}{l.s.files}
	if a, ok := l.s.files.(*archives); ok {
		parts, err := a.load(ctx)
		if err != nil {
			return false, err
		}
		places = places[:0]
		for _, p := range parts {
			places = append(places, p)
		}
	}
	for _, p := range places {
		rc, err := p.open(ctx, blobName(d.Digest.String()), d.Size)
		switch {
		case err == nil:
			n, err := length(rc)
			if err = errors.Join(err, rc.Close()); err != nil || n == d.Size {
				return err == nil, err
			}
		case !errors.Is(err, fs.ErrNotExist) && !fault.Is(err, fault.Unverified):
			return false, err
		}
	}
	return false, nil
}

// length returns the size of a blob in bytes. It reads a blob on a web server to its end.
func length(rc io.Reader) (int64, error) {
	switch r := rc.(type) {
	case *os.File:
		info, err := r.Stat()
		if err != nil {
			return 0, err
		}
		return info.Size(), nil
	case section:
		return r.n, nil
	}
	return io.Copy(io.Discard, rc)
}
