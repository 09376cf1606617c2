package registry

import (
	"context"
	"fmt"
)

// Bounds of a list of tags. A farm has two tags for each artifact.
const (
	maxTags     = 1 << 20
	maxTagPages = 1 << 12
)

// Tags lists all tags of the repository, in no particular order.
func (r *Repository) Tags(ctx context.Context) ([]string, error) {
	tags, err := r.s.tags(ctx)
	if err != nil {
		return nil, fmt.Errorf("list tags of %s: %w", r.name, err)
	}
	return tags, nil
}

func (s *remoteStore) tags(ctx context.Context) ([]string, error) {
	pages, err := s.puller.Lister(ctx, s.repo)
	if err != nil {
		return nil, s.readError(ctx, err)
	}
	var all []string
	for n := 0; pages.HasNext(); n++ {
		if n == maxTagPages {
			return nil, damaged(fmt.Errorf("the repository has more than %d pages of tags", maxTagPages))
		}
		page, err := pages.Next(ctx)
		if err != nil {
			return nil, s.readError(ctx, err)
		}
		if all = append(all, page.Tags...); len(all) > maxTags {
			return nil, damaged(fmt.Errorf("the repository has more than %d tags", maxTags))
		}
	}
	return all, nil
}

func (s *layoutStore) tags(ctx context.Context) ([]string, error) {
	idx, err := s.index(ctx)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, d := range idx.Manifests {
		if tag := d.Annotations[refName]; tag != "" {
			all = append(all, tag)
		}
	}
	return all, nil
}
