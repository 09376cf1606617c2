package cosbucket

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// parallel bounds the listings under way at one bucket.
const parallel = 16

// List returns the names of all objects that begin with prefix, in order. The
// error is a fault.Unsupported for web servers, which cannot list.
func (b *Bucket) List(ctx context.Context, prefix string) ([]string, error) {
	if prefix != "" {
		if err := checkName(strings.TrimSuffix(prefix, "/")); err != nil {
			return nil, err
		}
	}
	return b.names(ctx, prefix, func(m backend) ([]string, error) { return m.list(ctx, prefix) })
}

// names asks the first mirror that can list.
func (b *Bucket) names(ctx context.Context, what string, ask func(m backend) ([]string, error)) (names []string,
	err error) {
	err = b.each(ctx, func(m backend) (err error) {
		if names, err = ask(m); err != nil {
			err = fmt.Errorf("list %s: %w", m.url(what), err)
		}
		return err
	})
	slices.Sort(names)
	return names, err
}

// BuildIDs returns the builds that a COS bucket has folders of, newest first.
// It takes a listing of one level, however many objects the bucket has.
func (b *Bucket) BuildIDs(ctx context.Context) ([]string, error) {
	names, err := b.names(ctx, "", func(m backend) ([]string, error) { return m.folders(ctx) })
	if err != nil {
		return nil, err
	}
	ids := slices.DeleteFunc(names, func(name string) bool {
		_, err := target.ParseKernel(name, legacyBoard)
		return err != nil
	})
	slices.SortFunc(ids, func(x, y string) int { return target.CompareVersions(y, x) })
	return slices.Compact(ids), nil
}

// BuildsOf returns the kernels of these builds, in their order: one for each
// board that has a kernel_commit, in either layout. The commit itself is not
// read; see [Bucket.Describe]. Each build costs a listing, so who needs the
// newest few asks for those only.
func (b *Bucket) BuildsOf(ctx context.Context, ids []string) ([]target.Kernel, error) {
	found := make([][]target.Kernel, len(ids))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, id := range ids {
		g.Go(func() error {
			names, err := b.List(gctx, id+"/")
			if err == nil {
				found[i] = boards(id, names)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return slices.Concat(found...), nil
}

// boards returns the kernels that a build's objects tell of.
func boards(id string, names []string) []target.Kernel {
	var all []target.Kernel
	for _, name := range names {
		parts := strings.Split(name, "/")
		board := legacyBoard
		switch {
		case len(parts) == 3 && parts[2] == commitFile:
			board = parts[1]
		case len(parts) == 2 && parts[1] == commitFile:
		default:
			continue
		}
		if k, err := target.ParseKernel(id, board); err == nil {
			k.Milestone, _ = target.Milestone(id)
			all = append(all, k)
		}
	}
	slices.SortFunc(all, func(x, y target.Kernel) int { return strings.Compare(x.Board, y.Board) })
	return slices.Compact(all)
}

// Builds returns all COS builds in the bucket, oldest first, as [Bucket.BuildsOf]
// tells them.
func (b *Bucket) Builds(ctx context.Context) ([]target.Kernel, error) {
	ids, err := b.BuildIDs(ctx)
	if err != nil {
		return nil, err
	}
	slices.Reverse(ids)
	return b.BuildsOf(ctx, ids)
}

// Describe returns the kernel with its source commit.
func (b *Bucket) Describe(ctx context.Context, k target.Kernel) (target.Kernel, error) {
	text, url, err := b.small(ctx, k, CommitName(k), 1<<10)
	if err != nil {
		return k, err
	}
	commit := strings.TrimSpace(string(text))
	if !target.ValidCommit(commit) {
		return k, fault.New(fault.Unsupported, fmt.Sprintf("read %s: %.60q is not a commit of 40 hex digits", url, commit),
			"put the kernel's commit there: 40 hex digits and a newline")
	}
	k.Commit = commit
	return k, nil
}

// small reads a small object of a build from where either layout has it, and
// says where that was.
func (b *Bucket) small(ctx context.Context, k target.Kernel, name string, limit int64) (text []byte, url string,
	err error) {
	var absent []error
	for _, at := range Layouts(k, name) {
		text, err = b.ReadSmall(ctx, at, limit)
		if !fault.Is(err, fault.InputMissing) {
			return text, b.URL(at), err
		}
		absent = append(absent, err)
	}
	return nil, "", inOneLine(absent)
}
