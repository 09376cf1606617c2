package agent_test

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// halfway is a repository that fails while a node reads the statements. It serves the first ones only, as many as reads
// says. It lists the statements in unread without serving them. isCut means that its list is incomplete.
type halfway struct {
	agent.Repository
	reads  int
	unread []v1.Descriptor
	isCut  bool
}

func (h halfway) AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted ...map[string]string) ([][]byte, error) {
	all, err := h.Repository.AttachedIf(ctx, digest, artifactType, useful, wanted...)
	if err != nil {
		return nil, err
	}
	return all[:min(h.reads, len(all))], unreadError{fault.New(fault.Transient, "connection reset", ""),
		h.unread, h.isCut}
}

type unreadError struct {
	error
	list  []v1.Descriptor
	isCut bool
}

func (e unreadError) Unwrap() error           { return e.error }
func (e unreadError) Unread() []v1.Descriptor { return e.list }
func (e unreadError) IsCut() bool             { return e.isCut }

// withoutTests is a repository that does not list the results of load tests.
type withoutTests struct {
	agent.Repository
	v *trust.Verifier
}

func (w withoutTests) AttachedIf(ctx context.Context, digest, artifactType string, useful func([]byte) string,
	wanted ...map[string]string) ([][]byte, error) {
	all, err := w.Repository.AttachedIf(ctx, digest, artifactType, useful, wanted...)
	return slices.DeleteFunc(all, func(b []byte) bool {
		st, err := w.v.Statement(b)
		return err == nil && st.PredicateType == trust.PredicateTestResult
	}), err
}

// attachmentsOf returns the attachments that have statements of one type, as a registry lists them. If labels is false,
// the list has no labels.
func attachmentsOf(t *testing.T, ref, digest, predicate string, v *trust.Verifier, labels bool) (all []v1.Descriptor) {
	t.Helper()
	repo, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := repo.Referrers(t.Context(), digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		var m v1.Manifest
		raw, err := repo.Manifest(t.Context(), d.Digest.String())
		if err == nil {
			err = json.Unmarshal(raw, &m)
		}
		if err != nil {
			t.Fatal(err)
		}
		if raw, err = repo.Small(t.Context(), m.Layers[0]); err != nil {
			t.Fatal(err)
		}
		st, err := v.Statement(raw)
		if err != nil || st.PredicateType != predicate {
			continue
		}
		if d.Annotations = nil; labels {
			d.Annotations = trust.Labels(st)
		}
		all = append(all, d)
	}
	return all
}

// TestNextRepositoryOfUnread checks a first repository that fails while the node reads its statements. The statements
// that it served must count. It may list a statement that it does not serve and that may refuse the driver. Then the
// node needs that statement from the mirror.
func TestNextRepositoryOfUnread(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	c := sample.NewCell(t, buildA, newVersion)
	const rejected, installed = "rejected in the load test", ""
	rows := []struct {
		name          string
		named, mirror bool // whether the repository has the result of a load test
		reads         int
		predicate     string // type of the statements that are listed but not served; "" means none
		unlabelled    bool
		isCut         bool
		want          string
		passed        bool // whether the driver passed the load test
	}{
		{"the refusal was served", true, false, 99, "", false, false, rejected, false},
		{"the refusal was listed, and nobody has it", true, false, 0, trust.PredicateTestResult, false, false,
			"but does not serve", false},
		{"the same without labels", true, false, 0, trust.PredicateTestResult, true, false, "but does not serve", false},
		{"the refusal was listed, and the mirror has it", true, true, 0, trust.PredicateTestResult, false, false,
			rejected, false},
		{"the list ended in the middle", true, false, 0, "", false, true, "served only a part of its list of statements",
			false},
		{"the list ended behind the refusal", true, false, 99, "", false, true, rejected, false},
		{"only the provenance was not served", false, false, 0, trust.PredicateProvenance, false, false,
			installed, false},
		{"only a passed load test was not served", true, false, 0, trust.PredicateTestResult, false, false,
			installed, true},
		{"nothing was listed", false, false, 0, "", false, false, installed, false},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			named, mirror := layout(t), layout(t)
			p := sample.Publish(t, named, key, c)
			if row.named {
				attachTest(t, named, p.Digest, key, c, row.passed)
			}
			if !row.mirror {
				sample.Publish(t, mirror, key, c)
			} else if err := os.CopyFS(strings.TrimPrefix(mirror, "oci:"),
				os.DirFS(strings.TrimPrefix(named, "oci:"))); err != nil {
				t.Fatal(err)
			}
			unread := attachmentsOf(t, named, p.Digest, row.predicate, key.Verifier(t), !row.unlabelled)
			n := newNode(t, c, 1, key)
			n.parts.Registries = []string{mirror}
			open := n.parts.Open
			n.parts.Open = func(ref string) (agent.Repository, error) {
				r, err := open(ref)
				switch {
				case err == nil && ref == named:
					return halfway{r, row.reads, unread, row.isCut}, nil
				case err == nil: // the mirror has the statement's blob, but its list is older
					return withoutTests{r, key.Verifier(t)}, nil
				}
				return r, err
			}
			r, err := n.run(t, named, p.Digest, c.Driver)
			if row.want == installed && (err != nil || r.Verdict.Digest != p.Digest) ||
				row.want != installed && (err == nil || !strings.Contains(err.Error(), row.want)) ||
				(len(n.kernel.calls) > 0) != (row.want == installed) {
				t.Errorf("Run = %+v, %v, with the calls %v; want %q", r.Verdict, err, n.kernel.calls, row.want)
			}
		})
	}
}
