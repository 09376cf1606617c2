package tarball

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"cloud.google.com/go/storage"
	"golang.org/x/sys/unix"
	"google.golang.org/api/iterator"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gcs"
)

// CheckWrite returns an error if this user may not publish to the destination at gs://BUCKET/PREFIX or file:///FOLDER.
// It changes nothing, and creates no folder.
func CheckWrite(ctx context.Context, dest string) (err error) {
	u, err := parse(dest)
	if err != nil {
		return err
	}
	if u.Scheme == "file" {
		err = checkFolder(u)
	} else {
		err = checkBucket(ctx, u)
	}
	if err != nil {
		return fmt.Errorf("publish to %s: %w", dest, err)
	}
	return nil
}

// permissions are the permissions that publishing needs:
//   - "delete", because for Google the replacement of a list also deletes the old object,
//   - "list", because Google responds with "forbidden" for a missing object if the account may not list the bucket.
//
// The names are from https://cloud.google.com/storage/docs/access-control/iam-permissions.
var permissions = []string{
	"storage.objects.create", "storage.objects.delete", "storage.objects.get", "storage.objects.list",
}

// checkBucket asks Google which permissions the account has in the bucket as a whole. A permission for some names only,
// by a condition or a managed folder, counts as missing.
func checkBucket(ctx context.Context, u *url.URL) (err error) {
	g, err := openGCS(ctx, u)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	granted, err := g.IAM().TestPermissions(ctx, permissions)
	if gcs.Status(err) == http.StatusNotFound {
		// Either the bucket does not exist, or the server is an emulator, which does not know permissions. If the objects can
		// be listed, the bucket exists, so the server is an emulator.
		_, err = g.Objects(ctx, &storage.Query{Prefix: g.Path("")}).Next()
		if err == nil || errors.Is(err, iterator.Done) {
			return nil
		}
	}
	if err != nil {
		return g.fault(ctx, err)
	}
	lacks := slices.DeleteFunc(slices.Clone(permissions), func(p string) bool { return slices.Contains(granted, p) })
	if len(lacks) == 0 {
		return nil
	}
	hint := "give the account the role Storage Object User (roles/storage.objectUser) in " + g.BucketName()
	if g.Path("") != "" {
		hint += "; if the account has this role for names below " + g.Path("") + " only, ignore this finding"
	}
	return fault.New(fault.PublishRefused, "this account lacks "+strings.Join(lacks, ", "), hint)
}

// checkFolder checks whether this user may write the folder, or the nearest existing folder above it. It also checks
// the files of this package in the folder (see ownFolder).
func checkFolder(u *url.URL) error {
	dir, err := folderPath(u)
	if err != nil {
		return err
	}
	own := []string{filepath.Join(dir, ownFolder), filepath.Join(dir, lockFile), filepath.Join(dir, partFile)}
	for err = access(dir); errors.Is(err, fs.ErrNotExist) && dir != "/"; err = access(dir) {
		dir = filepath.Dir(dir)
	}
	for _, name := range own {
		if err == nil {
			dir, err = name, access(name)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		return fault.Wrap(fault.PublishRefused, &fs.PathError{Op: "write", Path: dir, Err: err},
			"give this user write access to the folder and to all of "+ownFolder+" in it")
	}
	return nil
}

// access returns an error if the effective user may not write a file or folder.
func access(name string) error {
	return unix.Faccessat(unix.AT_FDCWD, name, unix.W_OK, unix.AT_EACCESS)
}
