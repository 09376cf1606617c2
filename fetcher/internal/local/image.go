package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/fault"
)

// Image is a container image that has the builder and the tools that it runs. It is pulled
// when something has to be compiled, and removed when that is done.
type Image struct {
	Repository interface {
		PullImage(ctx context.Context, digest, arch, dir string) (v1.Image, error)
	}
	// Digest is the image's, or that of an index; it is all that vouches for it.
	Digest string
}

// imageFolder is where an image lies below the state folder while it is used.
const imageFolder = "builder-image"

// unpack pulls the image, and returns the folder of its root and the program that it starts.
func (i Image) unpack(ctx context.Context, stateDir string) (root, program string, remove func() error, err error) {
	dir := filepath.Join(stateDir, imageFolder)
	remove = func() error { return os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			err = fmt.Errorf("unpack the builder's image: %w", errors.Join(err, remove()))
		}
	}()
	if err := remove(); err != nil { // a run that was killed left it
		return "", "", remove, err
	}
	blobs, root := filepath.Join(dir, "blobs"), filepath.Join(dir, "root")
	for _, d := range []string{blobs, root} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return "", "", remove, fault.Disk(err, "free some space on the disk of "+stateDir)
		}
	}
	img, err := i.Repository.PullImage(ctx, i.Digest, runtime.GOARCH, blobs)
	if err != nil {
		return "", "", remove, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return "", "", remove, fault.Wrap(fault.Unverified, err, "")
	}
	if len(config.Config.Entrypoint) != 1 || !filepath.IsAbs(config.Config.Entrypoint[0]) {
		return "", "", remove, fault.New(fault.Usage, fmt.Sprintf("its entry point is %q; want one program", config.Config.Entrypoint),
			"name the image of Dockerfile.builder with --builder-image")
	}
	handle, err := os.OpenRoot(root)
	if err != nil {
		return "", "", remove, err
	}
	defer handle.Close()
	flat := mutate.Extract(img)
	defer flat.Close()
	if _, err := archive.Unpack(ctx, flat, handle, archive.Options{Root: true}); err != nil {
		return "", "", remove, err
	}
	// Programs in it run as other users, too.
	return root, config.Config.Entrypoint[0], remove, errors.Join(os.Chmod(root, 0o755), os.RemoveAll(blobs))
}
