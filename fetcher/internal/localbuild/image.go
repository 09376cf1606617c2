package localbuild

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/gofrs/flock"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/fault"
)

// Image is a container image with the builder. It is pulled for a compile and removed afterwards.
type Image struct {
	Repository interface {
		PullImage(ctx context.Context, digest, arch, dir string) (v1.Image, error)
	}
	// Digest is the digest of the image or of an index. Nothing else protects the image's integrity.
	Digest string
}

// imageFolder is the folder of the unpacked image below the state folder. compileLock is held from the beginning of a
// compile, with or without an image, until its artifact is staged.
const (
	imageFolder = "builder-image"
	compileLock = "builder-image.lock"
)

// lockCompiles takes the lock that excludes the compiles of other fetchers: a compile begins with the removal of what
// an earlier one made. lockCompiles does not wait: if the lock is held, it returns an error of kind Busy.
func lockCompiles(stateDir string) (unlock func() error, err error) {
	lock := flock.New(filepath.Join(stateDir, compileLock))
	if held, err := lock.TryLock(); err != nil {
		return nil, fmt.Errorf("lock the folder %s: %w", stateDir, err)
	} else if !held {
		return nil, fault.New(fault.Busy, "another fetcher compiles on this node",
			"wait until the other fetcher is done, then run fetcher again")
	}
	return lock.Unlock, nil
}

// Sweep removes an image that a killed run left in the state folder.
func Sweep(stateDir string) error {
	if _, err := os.Stat(filepath.Join(stateDir, imageFolder)); err != nil {
		return nil //nolint:nilerr // there is none
	}
	unlock, err := lockCompiles(stateDir)
	if fault.Is(err, fault.Busy) {
		return nil
	} else if err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(filepath.Join(stateDir, imageFolder)), unlock())
}

// mayEnter returns an error if this process cannot start an image. Call it before the image is pulled.
func mayEnter() error {
	var caps [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &caps[0]); err == nil && caps[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return fault.New(
			fault.Usage,
			"start the builder's image: this process is not allowed to mount",
			"run as root with CAP_SYS_ADMIN (privileged: true), or turn compiling off: --builder never",
		)
	}
	return nil
}

// unpack pulls and unpacks the image. It returns the root folder, the entry point, and a function that removes the
// image. The caller holds the lock of [lockCompiles].
func (i Image) unpack(ctx context.Context, stateDir string) (root, program string, remove func() error, err error) {
	if err := mayEnter(); err != nil {
		return "", "", nil, err
	}
	dir := filepath.Join(stateDir, imageFolder)
	remove = func() error { return os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			err = fmt.Errorf("unpack the builder's image: %w", errors.Join(err, remove()))
		}
	}()
	if err := os.RemoveAll(dir); err != nil { // a killed run left it
		return "", "", remove, err
	}
	blobs, root := filepath.Join(dir, "blobs"), filepath.Join(dir, "root")
	for _, d := range []string{blobs, root} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return "", "", remove, fault.Disk(err, "make space on the disk of "+stateDir)
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
		return "", "", remove, fault.New(
			fault.Usage,
			fmt.Sprintf("the image's entry point is %q; want one program", config.Config.Entrypoint),
			"set an image that was made from Dockerfile.builder: --builder HOST/NAME@sha256:DIGEST",
		)
	}
	handle, err := os.OpenRoot(root)
	if err != nil {
		return "", "", remove, err
	}
	defer handle.Close()
	flat := mutate.Extract(img)
	defer flat.Close()
	if _, err := archive.UnpackTar(ctx, flat, handle, archive.Options{Root: true}); fault.NoSpace(err) {
		return "", "", remove, fault.New(fault.DiskFull, err.Error(), "make space on the disk of "+stateDir)
	} else if err != nil {
		return "", "", remove, err
	}
	// Programs in the image may run as other users, who must be able to enter the root.
	return root, config.Config.Entrypoint[0], remove, errors.Join(os.Chmod(root, 0o755), os.RemoveAll(blobs))
}
