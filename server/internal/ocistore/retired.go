package ocistore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"cuelabs.dev/go/oci/ociregistry"
)

// retiredTag returns the deleted manifest that a create-only tag referred to.
func (s *Store) retiredTag(repo, tag string) (ociregistry.Descriptor, error) {
	name, err := repoPath(repo, "_retired", tag)
	if err != nil {
		return ociregistry.Descriptor{}, err
	}
	return s.readDescriptor(name)
}

// deniedRetired is the error if a push would give other content to the tag of a deleted manifest.
func deniedRetired(repo, tag string, was ociregistry.Digest) error {
	return fmt.Errorf("%w: tag %s of repository %s was create-only, until its manifest %s was deleted; "+
		"to let another artifact take it, run: server free-tags %s", ociregistry.ErrDenied, tag, repo, was, was)
}

// FreeTags allows other content for the create-only tags of a deleted manifest. It returns these tags with their
// repositories. After an error, it may have freed some of them.
func (s *Store) FreeTags(ctx context.Context, d string) ([]string, error) {
	freed := []string{}
	for repo, err := range s.Repositories(ctx, "") {
		if err != nil {
			return freed, err
		}
		dir, err := repoPath(repo, "_retired")
		if err != nil {
			return freed, err
		}
		entries, err := fs.ReadDir(s.root.FS(), dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return freed, err
		}
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			was, err := s.readDescriptor(name)
			if errors.Is(err, errDamaged) || errors.Is(err, fs.ErrNotExist) || err == nil && string(was.Digest) != d {
				continue
			}
			if err == nil {
				err = s.root.Remove(name)
			}
			if err != nil {
				return freed, fmt.Errorf("free tag %s of repository %s: %w", e.Name(), repo, err)
			}
			freed = append(freed, repo+":"+e.Name())
		}
		if err := s.syncDir(dir); err != nil {
			return freed, err
		}
	}
	return freed, nil
}
