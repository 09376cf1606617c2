package main

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	stock "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

// destination starts the in-memory registry of the library go-containerregistry. If audience is not empty, each
// response has it in the header registry.AudienceHeader. If hidden is true, only clients with credentials may list
// tags. writes counts the requests that change the registry.
func destination(t *testing.T, audience string, hidden bool) (ref string, writes *atomic.Int64) {
	t.Helper()
	writes = &atomic.Int64{}
	inner := stock.New(stock.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if audience != "" {
			w.Header().Set(registry.AudienceHeader, audience)
		}
		if _, _, known := r.BasicAuth(); hidden && !known && strings.HasSuffix(r.URL.Path, "/tags/list") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			writes.Add(1)
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://") + "/prebake/driver", writes
}

// bundleOf makes a bundle in a folder, with one driver of each given flavour. It returns the folder's reference.
func bundleOf(t *testing.T, flavours ...target.Flavour) string {
	t.Helper()
	ref := "oci:" + filepath.Join(t.TempDir(), "bundle")
	repo, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := testkit.NewKey(t)
	for _, f := range flavours {
		testkit.NewSample(t, key, testkit.SampleKernel("47"), target.Driver{Version: "535.261.03", Flavour: f}, "").Publish(t,
			repo)
	}
	return ref
}

// TestBundlePushLicence checks that bundle push refuses a driver that the destination's audience may not get, before it
// sends anything.
func TestBundlePushLicence(t *testing.T) {
	t.Parallel()
	open, both := bundleOf(t, target.Open), bundleOf(t, target.Open, target.Proprietary)
	for _, row := range []struct {
		name, file, audience string
		flags                []string
		code                 int
		hint                 string
	}{
		{"open to a public place", open, registry.AudiencePublic, nil, fault.PublishRefused.ExitCode(),
			"--redistribute userspace"},
		{"a mark that the server denies", open, registry.AudiencePublic, []string{"--private", "TO"},
			fault.PublishRefused.ExitCode(), "private destination"},
		{"open, user space may go", open, registry.AudiencePublic, []string{"--redistribute", "userspace"}, 0, ""},
		{"both, user space may go", both, registry.AudiencePublic, []string{"--redistribute", "userspace"},
			fault.PublishRefused.ExitCode(), "--redistribute all"},
		{"both, all may go", both, registry.AudiencePublic, []string{"--redistribute", "all"}, 0, ""},
		{"both to a private place", both, registry.AudiencePrivate, nil, 0, ""},
		{"both to this machine", both, "", nil, 0, ""},
		{"a word that is none", both, "", []string{"--redistribute", "some"}, fault.Usage.ExitCode(), "userspace"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			to, writes := destination(t, row.audience, false)
			args := []string{"bundle", "push", row.file, "--to", to}
			for _, flag := range row.flags {
				args = append(args, strings.Replace(flag, "TO", to, 1))
			}
			code, out, errs := run(t, args...)
			if code != row.code || !strings.Contains(errs, row.hint) {
				t.Errorf("bundle push = %d\n%s%s\nwant %d and %q", code, out, errs, row.code, row.hint)
			}
			if sent := writes.Load() > 0; sent != (row.code == 0) {
				t.Errorf("bundle push sent something: %t; want %t", sent, row.code == 0)
			}
		})
	}
}

// TestPushDriversOnTheInternet checks that --private marks a destination on the internet as private. After the push,
// pushDrivers must fail if a client without credentials can read the drivers.
func TestPushDriversOnTheInternet(t *testing.T) {
	t.Parallel()
	from, err := registry.Open(bundleOf(t, target.Proprietary), registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	to, writes := destination(t, "", true)
	repo, err := registry.Open(to, registry.Options{Username: "any", Password: "any"})
	if err != nil {
		t.Fatal(err)
	}
	rule := licence.Rule{Addresses: func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("203.0.113.7")}, nil // an example address of RFC 5737
	}}
	if got, err := pushDrivers(t.Context(), from, repo, rule); !fault.Is(err, fault.PublishRefused) || writes.Load() != 0 {
		t.Errorf("pushDrivers without --private = %v, %v, and %d writes; want publish-refused and no write", got, err,
			writes.Load())
	}
	rule.Private = []string{to}
	got, err := pushDrivers(t.Context(), from, repo, rule)
	if !fault.Is(err, fault.PublishRefused) || !strings.Contains(err.Error(), "can be read without credentials") ||
		writes.Load() == 0 {
		t.Errorf("pushDrivers to a registry that everybody reads = %v, %v; want publish-refused after a write", got, err)
	}
	rule.Redistribute = bundle.RedistributeAll
	if got, err := pushDrivers(t.Context(), from, repo, rule); err != nil || len(got) != 2 {
		t.Errorf("pushDrivers with --redistribute all = %v, %v; want both tags", got, err)
	}
}

// TestBundlePushOfAnUnknownFlavour checks that bundle push does not send a driver whose flavour is neither open nor
// proprietary, because no licence rule covers it.
func TestBundlePushOfAnUnknownFlavour(t *testing.T) {
	t.Parallel()
	ref := bundleOf(t, target.Open)
	from, err := registry.Open(ref, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	sample := testkit.NewSample(t, testkit.NewKey(t), testkit.SampleKernel("50"),
		target.Driver{Version: "535.261.03", Flavour: target.Open}, "")
	img, ok := mutate.Annotations(sample.Image, map[string]string{bundle.AnnotationDriverFlavour: "free"}).(v1.Image)
	if !ok {
		t.Fatal("no image")
	}
	d, err := from.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	if err := from.Tag(t.Context(), d, "z"); err != nil {
		t.Fatal(err)
	}
	to, writes := destination(t, "", false)
	code, out, errs := run(t, "bundle", "push", ref, "--to", to, "--redistribute", "all")
	if code != fault.Unverified.ExitCode() || !strings.Contains(errs, d.Digest.String()) || writes.Load() != 0 {
		t.Errorf("bundle push = %d\n%s%s, and %d writes\nwant %d, and none", code, out, errs, writes.Load(),
			fault.Unverified.ExitCode())
	}
}
