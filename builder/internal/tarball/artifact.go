package tarball

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// repository reads an OCI artifact.
type repository interface {
	Manifest(ctx context.Context, digest string) ([]byte, error)
	Small(ctx context.Context, d v1.Descriptor) ([]byte, error)
	Blob(ctx context.Context, digest string, size int64) (io.ReadCloser, error)
}

// FromArtifact unpacks the modules and the firmware of an OCI artifact into dir, which must be empty. It compares the
// bytes with their digests. The caller must have verified the artifact's signatures, and must add the COS build and the
// signing key to the returned release.
func FromArtifact(ctx context.Context, repo repository, digest, dir string) (Release, error) {
	r, err := fromArtifact(ctx, repo, digest, dir)
	if err != nil {
		return Release{}, fmt.Errorf("unpack artifact %s: %w", digest, err)
	}
	return r, nil
}

func fromArtifact(ctx context.Context, repo repository, digest, dir string) (Release, error) {
	manifest, err := repo.Manifest(ctx, digest)
	if err != nil {
		return Release{}, err
	}
	desc, err := bundle.ConfigDescriptor(manifest)
	if err != nil {
		return Release{}, err
	}
	config, err := repo.Small(ctx, desc)
	if err != nil {
		return Release{}, err
	}
	content, err := bundle.ParseManifest(manifest, config)
	if err != nil {
		return Release{}, err
	}
	for _, kind := range []bundle.LayerKind{bundle.LayerModules, bundle.LayerFirmware} {
		if err := unpackLayer(ctx, repo, content.Layer(kind), filepath.Join(dir, string(kind))); err != nil {
			return Release{}, fmt.Errorf("unpack the %s layer: %w", kind, err)
		}
	}
	id := content.Identity
	return Release{
		Kernel: target.Kernel{Arch: id.Arch}, Driver: id.Driver, Fingerprint: id.Fingerprint, Artifact: digest,
		Modules:  filepath.Join(dir, string(bundle.LayerModules), "drivers"),
		Firmware: filepath.Join(dir, string(bundle.LayerFirmware)),
	}, nil
}

func unpackLayer(ctx context.Context, repo repository, l bundle.ContentLayer, dir string) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fault.TempDisk(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fault.TempDisk(err)
	}
	defer root.Close()
	rc, err := repo.Blob(ctx, l.Digest, l.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	return bundle.Unpack(ctx, rc, l.Digest, l.DiffID, l.Size, root)
}
