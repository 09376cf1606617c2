package ocistore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"path"
	"slices"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"cuelabs.dev/go/oci/ociregistry/ociref"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// mediaTypeBlob is the media type of all blobs, because the protocol does not tell a registry their real media types.
const mediaTypeBlob = "application/octet-stream"

// file is a part of a file, or a manifest in memory, as an [ociregistry.BlobReader].
type file struct {
	io.Reader
	f    io.Closer
	desc ociregistry.Descriptor
}

func (f *file) Close() error                       { return f.f.Close() }
func (f *file) Descriptor() ociregistry.Descriptor { return f.desc }

// replaceNotExist returns unknown, an error of the protocol, if err says that a file is missing. Otherwise it returns
// err.
func replaceNotExist(err, unknown error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return unknown
	}
	return err
}

// GetBlob implements [ociregistry.Reader]. All repositories share their blobs: everybody may read every repository.
func (s *Store) GetBlob(ctx context.Context, repo string, d ociregistry.Digest) (ociregistry.BlobReader, error) {
	return s.GetBlobRange(ctx, repo, d, 0, -1)
}

// GetBlobRange implements [ociregistry.Reader]. It reads the blob from byte offset0 to before offset1; -1 means the
// end. It does not verify the blob, which may have some hundred MB: the client does.
func (s *Store) GetBlobRange(
	_ context.Context,
	_ string,
	d ociregistry.Digest,
	offset0, offset1 int64,
) (ociregistry.BlobReader, error) {
	sum, err := hexOf(d)
	if err != nil {
		return nil, err
	}
	f, err := s.root.Open(blobPath(sum))
	if err != nil {
		return nil, replaceNotExist(err, ociregistry.ErrBlobUnknown)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	size := info.Size()
	if offset1 < 0 || offset1 > size {
		offset1 = size
	}
	if offset0 < 0 || offset0 > offset1 {
		return nil, errors.Join(
			fmt.Errorf("%w: the request is for the bytes from %d to %d, but the blob has %d bytes", ociregistry.ErrRangeInvalid,
				offset0, offset1, size),
			f.Close(),
		)
	}
	desc := ociregistry.Descriptor{MediaType: mediaTypeBlob, Digest: d, Size: size}
	return &file{io.NewSectionReader(f, offset0, offset1-offset0), f, desc}, nil
}

// ResolveBlob implements [ociregistry.Reader].
func (s *Store) ResolveBlob(_ context.Context, _ string, d ociregistry.Digest) (ociregistry.Descriptor, error) {
	size, err := s.statBlob(d)
	if err != nil {
		return ociregistry.Descriptor{}, replaceNotExist(err, ociregistry.ErrBlobUnknown)
	}
	return ociregistry.Descriptor{MediaType: mediaTypeBlob, Digest: d, Size: size}, nil
}

// ResolveManifest implements [ociregistry.Reader]. A manifest whose content is missing or damaged is unknown, so that
// clients push it again.
func (s *Store) ResolveManifest(_ context.Context, repo string, d ociregistry.Digest) (ociregistry.Descriptor, error) {
	desc, _, err := s.readManifest(repo, d)
	return desc, err
}

// readManifest returns a manifest and its descriptor. It verifies the content, which is small. For a manifest whose
// content is missing or damaged, the error is ErrManifestUnknown.
func (s *Store) readManifest(repo string, d ociregistry.Digest) (ociregistry.Descriptor, []byte, error) {
	desc, err := s.statManifest(repo, d)
	if err != nil {
		return desc, nil, err
	}
	content, err := s.root.ReadFile(blobPath(d.Encoded()))
	if err != nil {
		return desc, nil, replaceNotExist(err, ociregistry.ErrManifestUnknown)
	}
	if desc.Digest != d || d.Algorithm().FromBytes(content) != d {
		return desc, nil, ociregistry.ErrManifestUnknown
	}
	return desc, content, nil
}

// statManifest returns the descriptor of a manifest. If its content is missing or has another size, the error is
// ErrManifestUnknown.
func (s *Store) statManifest(repo string, d ociregistry.Digest) (ociregistry.Descriptor, error) {
	desc, err := s.manifestOf(repo, d)
	if err != nil {
		return desc, err
	}
	info, err := s.root.Stat(blobPath(d.Encoded()))
	if err != nil {
		return desc, replaceNotExist(err, ociregistry.ErrManifestUnknown)
	}
	if info.Size() != desc.Size || desc.Size > MaxManifest {
		return desc, ociregistry.ErrManifestUnknown
	}
	return desc, nil
}

// manifestOf returns the descriptor of a manifest in a repository. Its content may be missing. If the file with the
// descriptor is damaged, manifestOf makes the descriptor from the content. If both are damaged, the size is -1.
func (s *Store) manifestOf(repo string, d ociregistry.Digest) (ociregistry.Descriptor, error) {
	sum, err := hexOf(d)
	if err != nil {
		return ociregistry.Descriptor{}, err
	}
	name, err := repoPath(repo, "_manifests", sum)
	if err != nil {
		return ociregistry.Descriptor{}, err
	}
	desc, err := s.readEntry(name)
	if errors.Is(err, ociregistry.ErrManifestUnknown) {
		desc, err = ociregistry.Descriptor{Digest: d, Size: -1}, nil
	}
	return basicDescriptor(desc), replaceNotExist(err, ociregistry.ErrManifestUnknown)
}

// readEntry reads an entry of a manifest, whose file has the manifest's hex digits as name. If the file is damaged,
// readEntry makes the entry from the manifest's content. If the content is damaged or missing, too, the error is
// ErrManifestUnknown.
func (s *Store) readEntry(name string) (ociregistry.Descriptor, error) {
	sum := path.Base(name)
	d := digest.NewDigestFromEncoded(algorithm(sum), sum)
	desc, err := s.readDescriptor(name)
	if err == nil && desc.Digest == d || err != nil && !errors.Is(err, errDamaged) {
		return desc, err
	}
	if d.Validate() != nil {
		s.logOnce(name, "remove this file: the registry has not written it")
		return desc, ociregistry.ErrManifestUnknown
	}
	s.logOnce(name, "push the manifest whose digest is the name of this file again, or delete the manifest")
	content, err := s.root.ReadFile(blobPath(sum))
	if err != nil {
		return desc, replaceNotExist(err, ociregistry.ErrManifestUnknown)
	}
	var m manifest
	if d.Algorithm().FromBytes(content) != d || json.Unmarshal(content, &m) != nil {
		return desc, ociregistry.ErrManifestUnknown
	}
	mediaType := m.MediaType
	switch {
	case mediaType != "":
	case m.Config == nil:
		mediaType = ocispec.MediaTypeImageIndex
	default:
		mediaType = ocispec.MediaTypeImageManifest
	}
	return m.descriptor(d, mediaType, len(content)), nil
}

// logOnce writes a damaged entry to the log, unless the log has it since the start.
func (s *Store) logOnce(name, hint string) {
	s.mu.Lock()
	known := s.logged[name]
	s.logged[name] = true
	s.mu.Unlock()
	if !known {
		s.log.Warn("entry of a repository damaged", "file", name, "hint", hint)
	}
}

// HasManifest reports whether a repository has a manifest.
func (s *Store) HasManifest(ctx context.Context, repo, d string) (bool, error) {
	_, err := s.ResolveManifest(ctx, repo, ociregistry.Digest(d))
	switch {
	case errors.Is(err, ociregistry.ErrManifestUnknown), errors.Is(err, ociregistry.ErrNameInvalid):
		return false, nil
	}
	return err == nil, err
}

// basicDescriptor returns a descriptor with only the three fields that the protocol's resolve methods return.
func basicDescriptor(d ociregistry.Descriptor) ociregistry.Descriptor {
	return ociregistry.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// ResolveTag implements [ociregistry.Reader].
func (s *Store) ResolveTag(ctx context.Context, repo, tag string) (ociregistry.Descriptor, error) {
	d, err := s.digestOfTag(repo, tag)
	if err != nil {
		return ociregistry.Descriptor{}, err
	}
	return s.ResolveManifest(ctx, repo, d)
}

// digestOfTag returns the digest of a tag's manifest, which may be missing.
func (s *Store) digestOfTag(repo, tag string) (ociregistry.Digest, error) {
	name, err := tagPath(repo, tag)
	if err != nil {
		return "", err
	}
	desc, err := s.readDescriptor(name)
	return desc.Digest, replaceNotExist(err, ociregistry.ErrManifestUnknown)
}

// GetManifest implements [ociregistry.Reader].
func (s *Store) GetManifest(_ context.Context, repo string, d ociregistry.Digest) (ociregistry.BlobReader, error) {
	desc, content, err := s.readManifest(repo, d)
	if err != nil {
		return nil, err
	}
	r := bytes.NewReader(content)
	return &file{r, io.NopCloser(r), desc}, nil
}

// GetTag implements [ociregistry.Reader].
func (s *Store) GetTag(ctx context.Context, repo, tag string) (ociregistry.BlobReader, error) {
	d, err := s.digestOfTag(repo, tag)
	if err != nil {
		return nil, err
	}
	return s.GetManifest(ctx, repo, d)
}

// Repositories implements [ociregistry.Lister].
func (s *Store) Repositories(ctx context.Context, startAfter string) iter.Seq2[string, error] {
	var names []string
	err := fs.WalkDir(s.root.FS(), "repos", func(p string, d fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if !d.IsDir() || !strings.HasPrefix(d.Name(), "_") {
			return nil
		}
		if name := strings.TrimPrefix(path.Dir(p), "repos/"); d.Name() == "_manifests" && name > startAfter {
			names = append(names, name)
		}
		return fs.SkipDir
	})
	if err != nil {
		return ociregistry.ErrorSeq[string](err)
	}
	slices.Sort(names)
	return ociregistry.SliceSeq(names)
}

// Tags implements [ociregistry.Lister].
func (s *Store) Tags(_ context.Context, repo, startAfter string) iter.Seq2[string, error] {
	manifests, err := repoPath(repo, "_manifests")
	if err == nil {
		_, err = s.root.Stat(manifests)
	}
	if err != nil {
		return ociregistry.ErrorSeq[string](replaceNotExist(err, ociregistry.ErrNameUnknown))
	}
	entries, err := fs.ReadDir(s.root.FS(), path.Join(path.Dir(manifests), "_tags"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return ociregistry.ErrorSeq[string](err)
	}
	names := []string{}
	for _, e := range entries { // ReadDir returns sorted names
		// Ignore a file whose name is not a valid tag: it must not stop a caller that reads all tags.
		if e.Name() > startAfter && ociref.IsValidTag(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return ociregistry.SliceSeq(names)
}

// checkTags returns an error if a tag of a repository cannot be read. A tag with damaged content is no error.
func (s *Store) checkTags(ctx context.Context, repo string) error {
	for tag, err := range s.Tags(ctx, repo, "") {
		if err != nil {
			return err
		}
		name, err := tagPath(repo, tag)
		if err != nil {
			return err
		}
		_, err = s.readDescriptor(name)
		if err != nil && !errors.Is(err, errDamaged) && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read tag %s: %w", tag, err)
		}
	}
	return nil
}

// Labels returns the annotations of at most n manifests that are attached to a manifest.
func (s *Store) Labels(ctx context.Context, repo, d string, n int) ([]map[string]string, error) {
	all, err := s.referrers(ctx, repo, ociregistry.Digest(d), "", n)
	labels := make([]map[string]string, len(all))
	for i, desc := range all {
		labels[i] = desc.Annotations
	}
	return labels, err
}

// Referrers implements [ociregistry.Lister]. A missing subject is not an error: it has no referrers.
func (s *Store) Referrers(
	ctx context.Context,
	repo string,
	subject ociregistry.Digest,
	artifactType string,
) iter.Seq2[ociregistry.Descriptor, error] {
	all, err := s.referrers(ctx, repo, subject, artifactType, math.MaxInt)
	if err != nil {
		return ociregistry.ErrorSeq[ociregistry.Descriptor](err)
	}
	return ociregistry.SliceSeq(all)
}

func (s *Store) referrers(
	ctx context.Context,
	repo string,
	subject ociregistry.Digest,
	artifactType string,
	n int,
) ([]ociregistry.Descriptor, error) {
	sum, err := hexOf(subject)
	if err != nil {
		return nil, err
	}
	dir, err := repoPath(repo, "_referrers", sum)
	if err != nil {
		return nil, err
	}
	entries, err := fs.ReadDir(s.root.FS(), dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all := []ociregistry.Descriptor{}
	for _, e := range entries {
		if len(all) == n {
			break
		}
		desc, err := s.readEntry(path.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ociregistry.ErrManifestUnknown) {
			continue // it was deleted after the folder was read, or its content is damaged, too
		}
		if err != nil {
			return nil, err
		}
		if artifactType != "" && desc.ArtifactType != artifactType {
			continue
		}
		// A killed process may leave an entry without its manifest, because the entry is written first. Do not list it. The
		// list does not read the manifests, because there may be hundreds. If a client then asks for a damaged manifest, the
		// registry responds that it is unknown.
		if _, err := s.statManifest(repo, desc.Digest); errors.Is(err, ociregistry.ErrManifestUnknown) {
			continue
		} else if err != nil {
			return nil, err
		}
		all = append(all, desc)
	}
	return all, nil
}
