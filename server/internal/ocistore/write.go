package ocistore

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"

	"cuelabs.dev/go/oci/ociregistry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/prebake/prebake/pkg/fault"
)

// The registry also accepts Docker's media types of manifests, for images that other tools copy here.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// PushBlob implements [ociregistry.Writer].
func (s *Store) PushBlob(
	_ context.Context,
	repo string,
	desc ociregistry.Descriptor,
	r io.Reader,
) (ociregistry.Descriptor, error) {
	sum, err := hexOf(desc.Digest)
	if err != nil {
		return desc, err
	}
	if _, err := repoPath(repo); err != nil {
		return desc, err
	}
	seen := algorithm(sum).Digester()
	count := &counter{}
	name, err := s.writeTemp(io.TeeReader(io.LimitReader(r, MaxBlob+1), io.MultiWriter(seen.Hash(), count)))
	if err != nil {
		return desc, fmt.Errorf("store the blob: %w", err)
	}
	switch {
	case count.n > MaxBlob || (desc.Size >= 0 && count.n != desc.Size):
		err = fmt.Errorf("%w: the uploaded content has %d bytes", ociregistry.ErrSizeInvalid, count.n)
	case seen.Digest() != desc.Digest:
		err = fmt.Errorf("%w: the uploaded content has digest %s", ociregistry.ErrDigestInvalid, seen.Digest())
	}
	if err != nil {
		return desc, errors.Join(err, s.root.Remove(name))
	}
	desc.Size = count.n
	return desc, s.moveBlob(name, sum)
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }

// MountBlob implements [ociregistry.Writer]. It copies nothing: all repositories share their blobs.
func (s *Store) MountBlob(ctx context.Context, _, toRepo string, d ociregistry.Digest) (ociregistry.Descriptor, error) {
	if _, err := repoPath(toRepo); err != nil {
		return ociregistry.Descriptor{}, err
	}
	return s.ResolveBlob(ctx, toRepo, d)
}

// PushBlobChunked implements [ociregistry.Writer].
func (s *Store) PushBlobChunked(ctx context.Context, repo string, _ int) (ociregistry.BlobWriter, error) {
	if _, err := repoPath(repo); err != nil {
		return nil, err
	}
	if err := s.needRoom(); err != nil {
		return nil, err
	}
	id := randomID()
	if err := s.own(id, ownerOf(ctx)); err != nil {
		return nil, err
	}
	f, err := s.root.OpenFile("uploads/"+id, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if err != nil {
		s.release(id)
		s.disown(id)
		return nil, fmt.Errorf("begin upload: %w", err)
	}
	return &upload{s: s, id: id, f: f, offset: -1}, nil
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// PushBlobChunkedResume implements [ociregistry.Writer]. An upload's only state is the length of its file, so an upload
// survives a restart.
func (s *Store) PushBlobChunkedResume(
	ctx context.Context,
	repo, id string,
	offset int64,
	_ int,
) (ociregistry.BlobWriter, error) {
	if _, err := repoPath(repo); err != nil {
		return nil, err
	}
	if !idPattern.MatchString(id) {
		return nil, ociregistry.ErrBlobUploadUnknown
	}
	// Claim the upload before its file is opened: another request may be about to remove the file or to make it a blob.
	if err := s.claim(id); err != nil {
		return nil, err
	}
	f, err := s.root.OpenFile("uploads/"+id, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		s.release(id)
		return nil, replaceNotExist(err, ociregistry.ErrBlobUploadUnknown)
	}
	u := &upload{s: s, id: id, f: f, offset: offset, full: fullOf(ctx)}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, u.Close())
	}
	u.size = info.Size()
	switch {
	case !offsetKnown(ctx):
		u.offset = -1 // without an offset, the chunk is appended
	case offset > 0 && offset != u.size:
		return nil, errors.Join(outOfOrder(offset, u.size), u.Close())
	}
	return u, nil
}

func outOfOrder(offset, size int64) error {
	return fmt.Errorf("%w: the chunk begins at byte %d, but the upload has %d bytes", ociregistry.ErrRangeInvalid,
		offset, size)
}

// CancelUpload removes an upload that no request writes to.
func (s *Store) CancelUpload(id string) error {
	if !idPattern.MatchString(id) {
		return ociregistry.ErrBlobUploadUnknown
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[id] {
		return fmt.Errorf("%w: another request writes to this upload", ociregistry.ErrBlobUploadInvalid)
	}
	delete(s.owners, id)
	return replaceNotExist(s.root.Remove("uploads/"+id), ociregistry.ErrBlobUploadUnknown)
}

// upload is an upload that one request has opened. No other request can write to it.
type upload struct {
	s      *Store
	id     string
	f      *os.File // nil after Close
	size   int64
	offset int64 // the size that the client expects; -1 if it gave none, or if it was checked
	left   int   // how many bytes may be written before the free space is checked
	full   *bool // set if the disk is full; nil if nobody asks
}

func (u *upload) ID() string     { return u.id }
func (u *upload) Size() int64    { return u.size }
func (u *upload) ChunkSize() int { return 64 << 10 }

// Write appends p. It checks the client's offset when the first bytes arrive. A last request without content has offset
// 0 and must not be refused. If the disk is full, Write removes the upload, because its bytes would keep the disk full.
func (u *upload) Write(p []byte) (int, error) {
	if u.offset >= 0 && u.offset != u.size {
		return 0, outOfOrder(u.offset, u.size)
	}
	u.offset = -1
	if u.size+int64(len(p)) > MaxBlob {
		return 0, fmt.Errorf("%w: the blob has more than %d bytes", ociregistry.ErrSizeInvalid, int64(MaxBlob))
	}
	if u.left -= len(p); u.left < 0 {
		if err := u.s.needRoom(); err != nil {
			return 0, u.stop(err)
		}
		u.left = checkEvery
	}
	n, err := u.f.Write(p)
	u.size += int64(n)
	if fault.NoSpace(err) {
		err = u.stop(err)
	}
	return n, err
}

// stop removes the upload, because there is no room for it.
func (u *upload) stop(err error) error {
	if u.full != nil && isFull(err) {
		*u.full = true
	}
	return errors.Join(err, u.Cancel())
}

// Close releases the upload, so that another request can resume it.
func (u *upload) Close() error {
	if u.f == nil {
		return nil
	}
	err := u.f.Close()
	u.f = nil
	u.s.release(u.id)
	return err
}

// Cancel removes the upload.
func (u *upload) Cancel() error {
	err := u.s.root.Remove("uploads/" + u.id)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	u.s.disown(u.id)
	return errors.Join(u.Close(), err)
}

// Commit makes the upload a blob. If the content has another digest, Commit removes the upload.
func (u *upload) Commit(d ociregistry.Digest) (desc ociregistry.Descriptor, err error) {
	sum, err := hexOf(d)
	if err != nil {
		return desc, errors.Join(err, u.Cancel())
	}
	if err := u.f.Sync(); err != nil {
		return desc, err
	}
	name := "uploads/" + u.id
	f, err := u.s.root.Open(name)
	if err != nil {
		return desc, err
	}
	seen := algorithm(sum).Digester()
	n, err := io.Copy(seen.Hash(), f)
	if err = errors.Join(err, f.Close()); err != nil {
		return desc, err
	}
	if seen.Digest() != d {
		err := fmt.Errorf("%w: the uploaded content has digest %s", ociregistry.ErrDigestInvalid, seen.Digest())
		return desc, errors.Join(err, u.Cancel())
	}
	if err := u.s.moveBlob(name, sum); err != nil {
		return desc, err
	}
	u.s.disown(u.id)
	return ociregistry.Descriptor{MediaType: mediaTypeBlob, Digest: d, Size: n}, u.Close()
}

// manifest has the fields that a registry must read, for all kinds of manifests.
type manifest struct {
	MediaType    string                   `json:"mediaType"`
	ArtifactType string                   `json:"artifactType"`
	Config       *ociregistry.Descriptor  `json:"config"`
	Layers       []ociregistry.Descriptor `json:"layers"`
	Manifests    []ociregistry.Descriptor `json:"manifests"`
	Subject      *ociregistry.Descriptor  `json:"subject"`
	Annotations  map[string]string        `json:"annotations"`
}

// descriptor returns the descriptor of a manifest of n bytes, as lists of referrers have it.
func (m manifest) descriptor(d digest.Digest, mediaType string, n int) ociregistry.Descriptor {
	desc := ociregistry.Descriptor{MediaType: mediaType, Digest: d, Size: int64(n), ArtifactType: m.ArtifactType,
		Annotations: m.Annotations}
	if desc.ArtifactType == "" && m.Config != nil {
		desc.ArtifactType = m.Config.MediaType // distribution-spec 1.1, "Listing Referrers"
	}
	return desc
}

// PushManifest implements [ociregistry.Writer]. It writes the content, the referrer's entry, the manifest and the tag.
// Keep this order: each needs the one before.
func (s *Store) PushManifest(
	ctx context.Context,
	repo, tag string,
	content []byte,
	mediaType string,
) (ociregistry.Descriptor, error) {
	return s.pushManifest(ctx, repo, tag, digest.FromBytes(content), content, mediaType)
}

// pushManifest stores a manifest under d, which is its SHA-256 or SHA-512 digest.
func (s *Store) pushManifest(
	ctx context.Context,
	repo, tag string,
	d digest.Digest,
	content []byte,
	mediaType string,
) (desc ociregistry.Descriptor, err error) {
	if len(content) > MaxManifest {
		return desc, fmt.Errorf("%w: the manifest has more than %d bytes", ociregistry.ErrManifestInvalid, MaxManifest)
	}
	var tagFile string
	if tag != "" {
		if tagFile, err = tagPath(repo, tag); err != nil {
			return desc, err
		}
	}
	// While the lock is held, no collection removes the checked blobs.
	s.collecting.RLock()
	defer s.collecting.RUnlock()
	m, err := s.parseAndCheck(ctx, repo, content, mediaType)
	if err != nil {
		return desc, err
	}
	full := m.descriptor(d, mediaType, len(content))
	desc = basicDescriptor(full)
	if tagFile != "" && s.createOnly(repo, tag) {
		if old, err := s.readDescriptor(tagFile); err == nil && old.Digest != desc.Digest {
			return desc, denied(repo, tag, old.Digest)
		}
	}
	if tagFile != "" {
		if old, err := s.retiredTag(repo, tag); err == nil && old.Digest != desc.Digest {
			return desc, deniedRetired(repo, tag, old.Digest)
		}
	}
	if err := s.putBytes(d, content); err != nil {
		return desc, fmt.Errorf("store the manifest: %w", err)
	}
	if m.Subject != nil {
		subject, err := hexOf(m.Subject.Digest)
		if err != nil {
			return desc, err
		}
		name, err := repoPath(repo, "_referrers", subject, desc.Digest.Encoded())
		if err != nil {
			return desc, err
		}
		if err := s.writeJSON(name, full); err != nil {
			return desc, fmt.Errorf("store the referrer: %w", err)
		}
	}
	name, err := repoPath(repo, "_manifests", desc.Digest.Encoded())
	if err != nil {
		return desc, err
	}
	if err := s.writeJSON(name, full); err != nil {
		return desc, fmt.Errorf("store the manifest: %w", err)
	}
	if tagFile == "" {
		return desc, nil
	}
	return desc, s.setTag(repo, tag, tagFile, desc)
}

func denied(repo, tag string, is ociregistry.Digest) error {
	return fmt.Errorf("%w: tag %s of repository %s is create-only, and the tag refers to %s", ociregistry.ErrDenied, tag,
		repo, is)
}

func (s *Store) setTag(repo, tag, name string, desc ociregistry.Descriptor) error {
	if !s.createOnly(repo, tag) {
		return s.writeJSON(name, desc)
	}
	err := s.createJSON(name, desc)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	old, err := s.readDescriptor(name)
	if err != nil {
		return err
	}
	if old.Digest != desc.Digest {
		return denied(repo, tag, old.Digest)
	}
	return nil
}

// parseAndCheck parses a manifest, and returns an error if a blob or manifest that it refers to is missing. Only the
// subject may be missing: the protocol allows a referrer before its subject.
func (s *Store) parseAndCheck(ctx context.Context, repo string, content []byte, mediaType string) (manifest, error) {
	var m manifest
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ociregistry.ErrManifestInvalid}, args...)...)
	}
	switch mediaType {
	case ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, dockerManifest, dockerList:
	default:
		return m, invalid("media type %q is not a media type of manifests", mediaType)
	}
	if err := json.Unmarshal(content, &m); err != nil {
		return m, invalid("%v", err)
	}
	if m.MediaType != "" && m.MediaType != mediaType {
		return m, invalid("the request has media type %q, but the manifest has media type %q", mediaType, m.MediaType)
	}
	if mediaType == ocispec.MediaTypeImageIndex || mediaType == dockerList {
		if m.Config != nil || len(m.Layers) > 0 {
			return m, invalid("an index must not have a config or layers")
		}
		for _, d := range m.Manifests {
			if _, err := s.ResolveManifest(ctx, repo, d.Digest); err != nil {
				return m, missing("manifest", d.Digest, err)
			}
		}
		return m, nil
	}
	if m.Config == nil || len(m.Manifests) > 0 {
		return m, invalid("an image manifest must have a config and no manifests")
	}
	for _, d := range append([]ociregistry.Descriptor{*m.Config}, m.Layers...) {
		size, err := s.statBlob(d.Digest)
		if errors.Is(err, fs.ErrNotExist) && nondistributable(d.MediaType) {
			continue // image specification, "Non-Distributable Layers": such a layer may never be pushed
		}
		if err != nil {
			return m, missing("blob", d.Digest, err)
		}
		if size != d.Size {
			return m, invalid("blob %s has %d bytes, but the manifest says %d bytes", d.Digest, size, d.Size)
		}
	}
	return m, nil
}

func nondistributable(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.nondistributable.") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.foreign.")
}

func missing(what string, d ociregistry.Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ociregistry.ErrManifestUnknown) {
		return fmt.Errorf("%w: %s %s", ociregistry.ErrManifestBlobUnknown, what, d)
	}
	return err
}

// DeleteTag implements [ociregistry.Deleter]. It keeps the manifest. It refuses to delete a create-only tag, because
// the tag could then get other content.
func (s *Store) DeleteTag(_ context.Context, repo, tag string) error {
	name, err := tagPath(repo, tag)
	if err != nil {
		return err
	}
	old, err := s.readDescriptor(name)
	if err != nil {
		return replaceNotExist(err, ociregistry.ErrManifestUnknown)
	}
	if s.createOnly(repo, tag) {
		return fmt.Errorf("%w; delete the manifest %s instead", denied(repo, tag, old.Digest), old.Digest)
	}
	return replaceNotExist(cmp.Or(s.root.Remove(name), s.syncDir(path.Dir(name))), ociregistry.ErrManifestUnknown)
}

// DeleteManifest implements [ociregistry.Deleter]. It deletes the tags of the manifest, and then the manifest. The
// content stays for [Store.Collect], because another repository may have it.
//
// Until [Store.FreeTags], a create-only tag can be made again only for the same content. A tag with damaged content
// stays, because it may be create-only. If a tag cannot be read, DeleteManifest returns an error and changes nothing,
// because the manifest may have this tag.
func (s *Store) DeleteManifest(ctx context.Context, repo string, d ociregistry.Digest) error {
	desc, err := s.manifestOf(repo, d)
	if err == nil {
		err = s.checkTags(ctx, repo)
	}
	if err != nil && !errors.Is(err, ociregistry.ErrManifestUnknown) {
		return err
	}
	// Forget the manifest before its deletion, so that no failure leaves a reference to a deleted manifest. Do this even
	// if the manifest is missing: a crash may have stopped an earlier deletion.
	if err := cmp.Or(s.forget(repo, d), err); err != nil {
		return err
	}
	for tag, err := range s.Tags(ctx, repo, "") {
		if err != nil {
			return err
		}
		name, err := tagPath(repo, tag)
		if err != nil {
			return err
		}
		at, err := s.readDescriptor(name)
		switch {
		case errors.Is(err, errDamaged) || err == nil && at.Digest != d:
			continue
		case err == nil && s.createOnly(repo, tag):
			var kept string
			if kept, err = repoPath(repo, "_retired", tag); err == nil {
				err = s.moveToFinal(name, kept)
			}
		case err == nil:
			err = s.root.Remove(name)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // somebody else may have deleted the tag meanwhile
			return fmt.Errorf("delete tag %s: %w", tag, err)
		}
	}
	name, err := repoPath(repo, "_manifests", desc.Digest.Encoded())
	if err != nil {
		return err
	}
	if err := cmp.Or(s.root.Remove(name), s.syncDir(path.Dir(name))); err != nil {
		return replaceNotExist(err, ociregistry.ErrManifestUnknown)
	}
	return s.forget(repo, d) // what somebody recorded meanwhile
}
