package catalogue_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

// TestLateReport checks which reports of builders may change a kernel: a report of an earlier attempt must not, and no
// report may change the fingerprint of a kernel that has published artifacts.
func TestLateReport(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	ctx := t.Context()
	fingerprint := func() target.Fingerprint {
		t.Helper()
		all, _, err := c.Kernels(ctx, store.KernelFilter{BuildID: first, Board: "lakitu"}, store.Page{})
		if err != nil || len(all) != 1 {
			t.Fatalf("Kernels() = %v, %v; want one", all, err)
		}
		return all[0].Fingerprint
	}
	update := func(id int64, u api.BuildUpdate) error { _, err := c.Update(ctx, id, u); return err }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b := request(t, c, first, v261, "open")
	check(update(b.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Fingerprint: fingerA}))
	check(update(b.ID, api.BuildUpdate{State: api.Building, Worker: "v", Attempt: 2}))
	check(update(b.ID, api.BuildUpdate{State: api.Failed, Class: "internal", Attempt: 1, Fingerprint: fingerB}))
	if got := fingerprint(); got != fingerA {
		t.Errorf("after a report of attempt 1 beside attempt 2, the fingerprint = %s; want %s", got.Short(), fingerA.Short())
	}
	check(update(b.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA}))
	next := request(t, c, first, v309, "proprietary")
	check(update(next.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1}))
	err := update(next.ID, api.BuildUpdate{Phase: "compile", Fingerprint: fingerB})
	if !fault.Is(err, fault.Mismatch) || fault.Hint(err) == "" {
		t.Errorf("Update(another fingerprint) = %v; want mismatch with a hint", err)
	}
	check(update(next.ID, api.BuildUpdate{State: api.Failed, Class: "internal", Fingerprint: fingerB}))
	if got := fingerprint(); got != fingerA {
		t.Errorf("with a published artifact, the fingerprint became %s; want %s", got.Short(), fingerA.Short())
	}
	if _, err := c.Yank(ctx, digest("1"), api.YankRequest{Reason: "the headers were wrong"}); err != nil {
		t.Fatal(err)
	}
	third := request(t, c, first, v309, "proprietary")
	check(update(third.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1, Fingerprint: fingerB}))
	if got := fingerprint(); got != fingerB {
		t.Errorf("without a published artifact, the fingerprint = %s; want %s", got.Short(), fingerB.Short())
	}
}

// TestRefusedPublication publishes a build whose fingerprint differs from that of the kernel's published artifacts. The
// build must fail with the text of the refusal. After these artifacts are deleted, another build with that fingerprint
// must succeed.
func TestRefusedPublication(t *testing.T) {
	t.Parallel()
	c, _ := world(t)
	ctx := t.Context()
	b := request(t, c, first, v261, "open")
	update(t, c, b.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Fingerprint: fingerA})
	next := request(t, c, first, v309, "proprietary")
	update(t, c, next.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 2})
	published := api.BuildUpdate{State: api.Published, Digest: digest("2"), Fingerprint: fingerB}
	refused := func(when string, attempt int, want api.State) api.Build {
		t.Helper()
		published.Attempt = attempt
		if _, err := c.Update(ctx, next.ID, published); !fault.Is(err, fault.Mismatch) || fault.Hint(err) == "" {
			t.Errorf("%s: Update(another fingerprint) = %v; want mismatch with a hint", when, err)
		}
		got, err := c.Build(ctx, next.ID)
		if err != nil || got.State != want {
			t.Fatalf("%s: Build() = %+v, %v; want %s", when, got, err, want)
		}
		return got
	}
	refused("while another attempt runs", 1, api.Building)
	got := refused("at the end", 2, api.Failed)
	if got.Class != "mismatch" || got.FinishedAt == nil || got.Digest != "" ||
		!strings.Contains(got.Error, "fingerprint") || !strings.Contains(got.Hint, "server request --build-id "+first) {
		t.Errorf("the refused build is %+v; want the refusal's class, text and hint", got)
	}
	if err := c.Abandon(ctx, next.ID, "the job ended"); err != nil {
		t.Fatal(err)
	}
	if got := refused("again", 2, api.Failed); got.Class != "mismatch" {
		t.Errorf("the refused build became %+v; want mismatch", got)
	}
	if err := c.Forget(ctx, "prebake/driver", digest("1")); err != nil {
		t.Fatal(err)
	}
	next = request(t, c, first, v309, "proprietary")
	update(t, c, next.ID, api.BuildUpdate{State: api.Published, Digest: digest("2"), Fingerprint: fingerB})
	published.Fingerprint = fingerA
	refused("after the publication", 0, api.Published)
}

// TestRefusals refuses publications for several reasons. The build must fail with the kind of the refusal. Otherwise it
// would only fail when its job ends, and then with kind internal. If the server itself fails, the build must stay open,
// so that the builder can report again.
func TestRefusals(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name        string
		set         func(*catalogue.Config)
		fingerprint target.Fingerprint
		kind        fault.Kind
		state       api.State
	}{
		{"the registry is public", func(c *catalogue.Config) { c.Public = true }, fingerA, fault.PublishRefused,
			api.Failed},
		{"the registry has no such manifest", func(c *catalogue.Config) {
			c.HasManifest = func(context.Context, string, string) (bool, error) { return false, nil }
		}, fingerA, fault.Mismatch, api.Failed},
		{"nobody reported a fingerprint", func(*catalogue.Config) {}, "", fault.Usage, api.Failed},
		{"the registry's disk is broken", func(c *catalogue.Config) {
			c.HasManifest = func(context.Context, string, string) (bool, error) { return false, errors.New("disk: I/O error") }
		}, fingerA, fault.Transient, api.Building},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			c, _ := open(t)
			row.set(&c.Config)
			b := request(t, c, first, v261, "open")
			update(t, c, b.ID, api.BuildUpdate{State: api.Building, Worker: "w", Attempt: 1})
			_, err := c.Update(t.Context(), b.ID, api.BuildUpdate{State: api.Published, Digest: digest("1"), Attempt: 1,
				Fingerprint: row.fingerprint})
			if !fault.Is(err, row.kind) {
				t.Errorf("Update(published) = %v; want %s", err, row.kind)
			}
			got, err := c.Build(t.Context(), b.ID)
			if err != nil || got.State != row.state {
				t.Fatalf("Build() = %+v, %v; want %s", got, err, row.state)
			}
			if row.state == api.Failed && (got.Class != row.kind.String() || got.Error == "" || got.Digest != "") {
				t.Errorf("the refused build has class %q, error %q and digest %q; want %s with the refusal's text", got.Class,
					got.Error, got.Digest, row.kind)
			}
		})
	}
}
