package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/prebake/prebake/pkg/fault"
)

// annotationTitle is the annotation with the file name of a layer (image-spec 1.1, annotations.md). `oras pull` uses
// it.
const annotationTitle = "org.opencontainers.image.title"

// Bounds of an artifact whose layers are files.
const (
	// MaxFiles is the maximum number of files.
	MaxFiles = 4096
	// MaxFile is the maximum size of one file in bytes.
	MaxFile = 256 << 20
)

// FilesManifest returns the manifest and the config of an artifact whose layers are files.
func FilesManifest(artifactType string, files []v1.Descriptor) (manifest, config []byte, err error) {
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: artifactType, Layers: files,
		Config: v1.Descriptor{MediaType: emptyType},
	}
	if m.Config.Digest, m.Config.Size, err = v1.SHA256(bytes.NewReader(emptyConfig)); err != nil {
		return nil, nil, err
	}
	manifest, err = json.Marshal(m)
	return manifest, emptyConfig, err
}

// FileDescriptor returns the descriptor of a file. The name is a relative path with slashes.
func FileDescriptor(name, mediaType string, digest v1.Hash, size int64) v1.Descriptor {
	return v1.Descriptor{
		MediaType: types.MediaType(mediaType), Digest: digest, Size: size,
		Annotations: map[string]string{annotationTitle: name},
	}
}

// SaveFiles writes the files of an artifact of this type to a folder, and returns their names. It compares each file
// with its digest. It replaces no file. It refuses names that lead out of the folder, equal names, and a file that is
// the folder of another. After an error, it removes the files that it wrote.
//
// SaveFiles is a function and not a method, so that a program that does not call it does not link it.
func SaveFiles(ctx context.Context, r *Repository, digest, artifactType, dir string) (names []string, err error) {
	names, err = saveFiles(ctx, r, digest, artifactType, dir)
	if err != nil {
		err = fmt.Errorf("save the files of %s from %s: %w", digest, r.name, err)
	}
	return names, err
}

func saveFiles(ctx context.Context, r *Repository, digest, artifactType, dir string) (names []string, err error) {
	raw, err := r.Manifest(ctx, digest)
	if err != nil {
		return nil, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil || m.ArtifactType != artifactType {
		return nil, fault.Errorf(fault.Unverified, "the manifest has artifact type %.100q; want %s", m.ArtifactType,
			artifactType)
	}
	if len(m.Layers) > MaxFiles {
		return nil, fault.Errorf(fault.Unverified, "the artifact has %d files; want at most %d files", len(m.Layers),
			MaxFiles)
	}
	taken := make(map[string]bool, len(m.Layers))
	for _, l := range m.Layers {
		name := l.Annotations[annotationTitle]
		if !filepath.IsLocal(name) || path.Clean(name) != name || name == "." || l.Size < 0 || l.Size > MaxFile {
			return nil, fault.Errorf(fault.Unverified,
				"file %.200q of %d bytes: want a clean relative path and at most %d bytes", name, l.Size, MaxFile)
		}
		if taken[name] {
			return nil, fault.Errorf(fault.Unverified, "two files have the name %.200q", name)
		}
		taken[name] = true
		names = append(names, name)
	}
	for _, name := range names {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if taken[dir] {
				return nil, fault.Errorf(fault.Unverified, "the file %.200q is below the file %.200q", name, dir)
			}
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fault.Disk(err, "free space on the disk of "+dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	for _, name := range names {
		if err := mustBeAbsent(root, name); err != nil {
			return nil, fmt.Errorf("save file %q: %w", name, err)
		}
	}
	for i, l := range m.Layers {
		if err := saveFile(ctx, r, root, names[i], l); err != nil {
			err = fmt.Errorf("save file %q: %w", names[i], err)
			for _, written := range names[:i] {
				err = errors.Join(err, root.Remove(written))
			}
			return nil, err
		}
	}
	return names, nil
}

const hintEmptyFolder = "choose a folder that is new or empty"

// mustBeAbsent returns an error if name exists, or if a file is in the place of one of its folders.
func mustBeAbsent(root *os.Root, name string) error {
	_, err := root.Lstat(name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err == nil:
		err = os.ErrExist
	}
	return fault.Wrap(fault.Usage, err, hintEmptyFolder)
}

func saveFile(ctx context.Context, r *Repository, root *os.Root, name string, l v1.Descriptor) (err error) {
	rc, err := r.Blob(ctx, l.Digest.String(), l.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return fault.Disk(err, "free space on the disk of the folder for the files")
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, os.ErrExist) {
		return fault.Wrap(fault.Usage, err, hintEmptyFolder)
	}
	if err != nil {
		return err
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(f, h), rc)
	if err = errors.Join(err, f.Close()); err == nil && hex.EncodeToString(h.Sum(nil)) != l.Digest.Hex {
		err = damaged(fmt.Errorf("the content has digest sha256:%x", h.Sum(nil)))
	}
	if err != nil {
		return errors.Join(fault.Disk(err, "free space on the disk of the folder for the files"), root.Remove(name))
	}
	return nil
}
