package offline

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// packer collects blobs and the entries of the index.
type packer struct {
	blobs  map[string]blob // by the hex digits of the digest
	index  []v1.Descriptor
	since  *registry.Layout
	report Report
}

// blob describes a blob and how to read it.
type blob struct {
	v1.Descriptor
	open func(context.Context) (io.ReadCloser, error)
}

func (p *packer) add(d v1.Descriptor, open func(context.Context) (io.ReadCloser, error)) error {
	if d.Digest.Algorithm != "sha256" || d.Size < 0 {
		return fault.Errorf(fault.Unverified,
			"blob with digest %.100q and size %d: want a SHA-256 digest, and a size that is not negative",
			d.Digest, d.Size)
	}
	if have, ok := p.blobs[d.Digest.Hex]; ok && have.Size != d.Size {
		return fault.Errorf(fault.Unverified, "blob %s has two declared sizes, %d and %d bytes", d.Digest, have.Size, d.Size)
	}
	p.blobs[d.Digest.Hex] = blob{d, open}
	return nil
}

// addBytes adds a small blob from memory.
func (p *packer) addBytes(raw []byte) (v1.Descriptor, error) {
	digest, size, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{Digest: digest, Size: size}
	return d, p.add(d, func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
}

func (p *packer) manifest(
	ctx context.Context,
	repo *registry.Repository,
	digest string,
) (v1.Descriptor, *v1.Manifest, error) {
	return p.manifestIf(ctx, repo, digest, func(*v1.Manifest) bool { return true })
}

// manifestIf reads a manifest. If the callback accepts the manifest, manifestIf adds it with its config and layers.
// Otherwise manifestIf adds nothing and returns a nil manifest.
func (p *packer) manifestIf(
	ctx context.Context,
	repo *registry.Repository,
	digest string,
	want func(*v1.Manifest) bool,
) (v1.Descriptor, *v1.Manifest, error) {
	raw, err := repo.Manifest(ctx, digest)
	if err != nil {
		return v1.Descriptor{}, nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return v1.Descriptor{}, nil, fault.Errorf(fault.Unverified, "read manifest %s: %w", digest, err)
	}
	if !want(&m) {
		return v1.Descriptor{}, nil, nil
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		open := func(ctx context.Context) (io.ReadCloser, error) { return repo.Blob(ctx, d.Digest.String(), d.Size) }
		if err := p.add(d, open); err != nil {
			return v1.Descriptor{}, nil, fmt.Errorf("pack manifest %s: %w", digest, err)
		}
	}
	d, err := p.addBytes(raw)
	if d.MediaType = m.MediaType; d.MediaType == "" {
		d.MediaType = types.OCIManifestSchema1
	}
	return d, &m, err
}

// addEntry adds a manifest to the index under a name, such as a tag.
func (p *packer) addEntry(d v1.Descriptor, name string) {
	d.Annotations = map[string]string{registry.AnnotationRefName: name}
	p.index = append(p.index, d)
}

// addFiles adds an artifact whose layers are files.
func (p *packer) addFiles(artifactType, tag string, files []v1.Descriptor) error {
	manifest, config, err := registry.FilesManifest(artifactType, files)
	if err != nil {
		return err
	}
	if _, err := p.addBytes(config); err != nil {
		return err
	}
	d, err := p.addBytes(manifest)
	if err != nil {
		return err
	}
	d.MediaType, d.ArtifactType = types.OCIManifestSchema1, artifactType
	p.addEntry(d, tag)
	return nil
}

// addFolder adds all files of a folder as the snapshot.
func (p *packer) addFolder(dir string) (int, error) {
	var files []v1.Descriptor
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
			return fault.Wrap(fault.Usage, err, "give --snapshot a folder that exists and that this user may read")
		case err != nil || e.IsDir():
			return err
		case !e.Type().IsRegular():
			return fault.New(fault.Usage, path+" is not a regular file", "give --snapshot a folder that has only regular files")
		case len(files) == registry.MaxFiles:
			return fault.New(fault.Usage, fmt.Sprintf("the folder has more than %d files", registry.MaxFiles),
				"give --snapshot a folder that has only the snapshot's files")
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		raw, err := readFile(path)
		if err != nil {
			return err
		}
		d, err := p.addBytes(raw)
		files = append(files, registry.FileDescriptor(filepath.ToSlash(name), "application/octet-stream", d.Digest, d.Size))
		return err
	})
	if err == nil && len(files) == 0 {
		err = fault.New(fault.Usage, "the folder is empty", "give --snapshot the folder with the snapshot's files")
	}
	if err != nil {
		return 0, fmt.Errorf("read snapshot %s: %w", dir, err)
	}
	return len(files), p.addFiles(TypeSnapshot, TagSnapshot, files)
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > registry.MaxFile {
		return nil, fault.Errorf(fault.Usage, "%s has more than %d bytes", path, registry.MaxFile)
	}
	return os.ReadFile(path)
}

// epoch is the time of every entry in the tar.
var epoch = time.Unix(0, 0).UTC()

// write writes the tar: the file oci-layout, index.json, and the blobs in the order of their digests.
func (p *packer) write(ctx context.Context, w io.Writer) error {
	count := &counter{w: w}
	t := tar.NewWriter(count)
	slices.SortFunc(p.index, func(a, b v1.Descriptor) int {
		return cmp.Or(strings.Compare(a.Digest.Hex, b.Digest.Hex),
			strings.Compare(a.Annotations[registry.AnnotationRefName], b.Annotations[registry.AnnotationRefName]))
	})
	idx := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: p.index}
	if p.report.Base != "" {
		idx.Annotations = map[string]string{registry.AnnotationBase: p.report.Base}
	}
	index, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	p.report.Index = ocidigest.FromBytes(index).String()
	for _, file := range []struct {
		name string
		raw  []byte
	}{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", index}} {
		if err := header(t, file.name, int64(len(file.raw))); err != nil {
			return err
		}
		if _, err := t.Write(file.raw); err != nil {
			return err
		}
	}
	for _, hex := range slices.Sorted(maps.Keys(p.blobs)) {
		b := p.blobs[hex]
		if p.since != nil {
			has, err := p.since.Has(ctx, b.Descriptor)
			if err != nil {
				return err
			}
			if has {
				p.report.LeftOut++
				p.report.LeftOutBytes += b.Size
				continue
			}
		}
		p.report.Blobs++
		p.report.Bytes += b.Size
		if err := header(t, "blobs/sha256/"+hex, b.Size); err != nil {
			return err
		}
		if err := b.copy(ctx, t); err != nil {
			return fmt.Errorf("pack blob %s: %w", b.Digest, err)
		}
	}
	err = t.Close()
	p.report.Size = count.n
	return err
}

func header(t *tar.Writer, name string, size int64) error {
	return t.WriteHeader(
		&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: epoch, Format: tar.FormatUSTAR},
	)
}

// copy writes the content of a blob and compares it with the blob's digest.
func (b blob) copy(ctx context.Context, w io.Writer) error {
	rc, err := b.open(ctx)
	if err != nil {
		return err
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), io.LimitReader(rc, b.Size+1))
	if err = errors.Join(err, rc.Close()); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); n != b.Size || got != b.Digest.Hex {
		return fault.New(fault.Unverified,
			fmt.Sprintf("the repository sent %d bytes with digest sha256:%s; want %d bytes", n, got, b.Size),
			"publish the artifact again, or use another repository: this one serves altered bytes")
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
