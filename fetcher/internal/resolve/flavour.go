package resolve

import (
	"context"
	"fmt"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/gpulist"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Lister returns the signed list of GPUs that a published artifact supports, or nil if it has none. The kernel is the
// node's.
type Lister func(ctx context.Context, repository, digest string, d target.Driver, k target.Kernel) (*gpulist.List,
	error)

type statements interface {
	Statement(bundle []byte) (*trust.Statement, error)
}

// Attachments is the part of a repository that [Signed] needs.
type Attachments interface {
	AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
		wanted ...map[string]string) ([][]byte, error)
}

// Signed returns a Lister that reads the signed statements that are attached to an artifact. It ignores statements that
// do not verify, because anybody who may write to the registry may attach one. If the artifact's repository fails, the
// Lister reads the statements from the repositories in others.
//
// Another repository without a list is believed only if it has a kernel match for the node, which the builder attaches
// after the list. Other programs copy in an order of their own, so a copy that they did not finish may have the match
// and lack the list. Then flavour auto chooses as for an artifact without a list.
func Signed(v statements, open func(repository string) (Attachments, error), others ...string) Lister {
	return func(ctx context.Context, repository, digest string, d target.Driver, k target.Kernel) (*gpulist.List, error) {
		var lists []*gpulist.List
		useful := func(raw []byte) string {
			st, err := v.Statement(raw)
			if err != nil || st.PredicateType != gpulist.PredicateType || !st.About(digest) {
				return ""
			}
			l, err := gpulist.ParsePredicate(st.Predicate)
			if err != nil || l.Version != d.Version {
				return ""
			}
			lists = append(lists, l)
			return st.Signer() + string(st.Predicate)
		}
		unread := false // whether a repository that may have a list has failed
		read := func(ref string) error {
			repo, err := open(ref)
			if err == nil {
				_, err = repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, useful, trust.OfType(gpulist.PredicateType))
			}
			switch {
			case len(lists) > 0: // use the list even if the repository then failed
				return nil
			case err != nil || !unread:
				return err
			}
			found, err := hasMatch(ctx, v, repo, digest, k)
			if err == nil && !found {
				err = fault.New(fault.NoArtifact, "the artifact has no list of supported GPUs", "")
			}
			return err
		}
		failed := func(_ string, err error) { unread = unread || !fault.Is(err, fault.NoArtifact) }
		if err := TryEach(ctx, Repositories(repository, others), read, failed); err != nil {
			return nil, fmt.Errorf("read supported GPUs: %w", err)
		}
		if len(lists) > 0 {
			return lists[0], nil
		}
		return nil, nil
	}
}

// hasMatch reports whether a repository has a kernel match for the node. It reads none for other kernels: an artifact
// may have hundreds.
func hasMatch(ctx context.Context, v statements, repo Attachments, digest string, k target.Kernel) (found bool,
	err error) {
	useful := func(raw []byte) string {
		st, err := v.Statement(raw)
		if err != nil || !st.About(digest) {
			return ""
		}
		if m, err := trust.ParseKernelMatch(st); err != nil || m.Kernel.String() != k.String() {
			return ""
		}
		found = true
		return st.PredicateType
	}
	_, err = repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, useful,
		map[string]string{trust.LabelPredicate: trust.PredicateKernelMatch, trust.LabelKernel: k.String()})
	if found {
		err = nil
	}
	return found, err
}

func (l Lister) list(ctx context.Context, a Answer, k target.Kernel) (*gpulist.List, error) {
	if l == nil {
		return nil, nil
	}
	return l(ctx, a.Repository, a.Digest, a.Driver, k)
}

// narrowFlavour replaces flavour auto by proprietary if the node has a GPU older than Turing. Open modules drive no
// such GPU.
func (q Question) narrowFlavour() Question {
	if _, err := gpulist.Choose(q.GPUs, []gpulist.Offer{{Flavour: target.Open}}); err != nil && q.Flavour == Auto {
		q.Flavour = string(target.Proprietary)
	}
	return q
}

// unfitAnswer returns the answer for a node whose GPUs the published artifacts do not drive. A node that compiles for
// itself then builds the proprietary flavour.
func unfitAnswer(a Answer, unfit error) Answer {
	return Answer{
		State: api.Unsupported, Driver: target.Driver{Version: a.Driver.Version, Flavour: target.Proprietary},
		Source: a.Source,
		Reason: unfit.Error(), Hint: fault.Hint(unfit),
	}
}
