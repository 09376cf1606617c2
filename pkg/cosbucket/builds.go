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

// parallel is the maximum number of listings that run at once.
const parallel = 16

// List returns the sorted names of all objects that begin with prefix. If no mirror can list, the error is of kind
// Unsupported.
func (b *Bucket) List(ctx context.Context, prefix string) ([]string, error) {
	if prefix != "" {
		if err := checkName(strings.TrimSuffix(prefix, "/")); err != nil {
			return nil, err
		}
	}
	return b.listNames(ctx, prefix, func(m backend) ([]string, error) { return m.list(ctx, prefix) })
}

// listNames asks the mirrors in turn until one can list, and returns the sorted names.
func (b *Bucket) listNames(ctx context.Context, what string, f func(m backend) ([]string, error)) (names []string,
	err error) {
	err = b.tryMirrors(ctx, func(m backend) (err error) {
		if names, err = f(m); err != nil {
			err = fmt.Errorf("list %s: %w", m.url(what), err)
		}
		return err
	})
	slices.Sort(names)
	return names, err
}

// BuildIDs returns the BUILD_IDs for which a COS bucket has a folder, newest first. It lists only the top level of the
// bucket.
func (b *Bucket) BuildIDs(ctx context.Context) ([]string, error) {
	names, err := b.listNames(ctx, "", func(m backend) ([]string, error) { return m.folders(ctx) })
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

// BuildsOf returns the kernels of these COS builds, in the order of ids: one for each board with an object
// kernel_commit. It lists the bucket once for each COS build. It does not read the kernels' commits; see
// [Bucket.Describe].
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

// boards returns the kernels of a COS build, which it finds by the names of the objects in the bucket.
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

// Builds returns the kernels of all COS builds in the bucket, oldest build first, as [Bucket.BuildsOf] returns them.
func (b *Bucket) Builds(ctx context.Context) ([]target.Kernel, error) {
	ids, err := b.BuildIDs(ctx)
	if err != nil {
		return nil, err
	}
	slices.Reverse(ids)
	return b.BuildsOf(ctx, ids)
}

// Describe reads the source commit of a kernel, and returns the kernel with this commit.
func (b *Bucket) Describe(ctx context.Context, k target.Kernel) (target.Kernel, error) {
	text, url, err := b.readOfBuild(ctx, k, CommitName(k), 1<<10)
	if err != nil {
		return k, err
	}
	commit := strings.TrimSpace(string(text))
	if !target.ValidCommit(commit) {
		return k, fault.New(fault.Unsupported, fmt.Sprintf("read %s: %.60q is not a commit of 40 hex digits", url, commit),
			"put the kernel's commit into this object: 40 hex digits and a newline")
	}
	k.Commit = commit
	return k, nil
}

// readOfBuild reads a small object of a COS build, from the first of its [Layouts] that the bucket has. It also returns
// the URL from which the object was read.
func (b *Bucket) readOfBuild(ctx context.Context, k target.Kernel, name string, limit int64) (text []byte, url string,
	err error) {
	var absent []error
	for _, at := range Layouts(k, name) {
		text, url, err = b.readSmall(ctx, at, limit)
		if !fault.Is(err, fault.InputMissing) {
			return text, url, err
		}
		absent = append(absent, err)
	}
	return nil, "", fault.Join(absent...)
}
