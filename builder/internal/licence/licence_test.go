package licence_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	stock "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/distribution"
	"github.com/prebake/prebake/pkg/testkit/gcs"
)

// lookupOf returns a function for Rule.Addresses that returns the given addresses for every host. A real look-up would
// return loopback addresses, because all hosts of these tests are this machine.
func lookupOf(addresses ...string) func(context.Context, string) ([]netip.Addr, error) {
	return func(context.Context, string) ([]netip.Addr, error) {
		var all []netip.Addr
		for _, a := range addresses {
			all = append(all, netip.MustParseAddr(a))
		}
		return all, nil
	}
}

const (
	internet = "203.0.113.9" // an example address of RFC 5737
	cluster  = "10.96.0.7"
)

func open(t *testing.T, ref string, o registry.Options) *registry.Repository {
	t.Helper()
	repo, err := registry.Open(ref, o)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

func push(t *testing.T, repo *registry.Repository) string {
	t.Helper()
	img, err := random.Image(64, 1)
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Push(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	return d.Digest.String()
}

// startRegistry starts a registry of the library go-containerregistry. gate sees each request first. It returns 0 to
// let the registry answer, or the HTTP status to answer with.
func startRegistry(t *testing.T, gate func(*http.Request) int) string {
	t.Helper()
	inner := stock.New(stock.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status := gate(r); status != 0 {
			w.Header().Set("Www-Authenticate", `Basic realm="test"`)
			w.WriteHeader(status)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://") + "/prebake/driver"
}

func password(r *http.Request) int {
	if _, given, ok := r.BasicAuth(); ok && given == distribution.Password {
		return 0
	}
	return http.StatusUnauthorized
}

// TestRegistries checks which destinations Check allows, with two registries: Debian's docker-registry, and the
// registry of the library go-containerregistry.
func TestRegistries(t *testing.T) {
	t.Parallel()
	login := registry.Options{Username: distribution.User, Password: distribution.Password}
	for _, kind := range []struct{ name, free, locked string }{
		{"docker-registry", distribution.Start(t) + "/prebake/driver", distribution.StartProtected(t) + "/prebake/driver"},
		{"in process", startRegistry(t, func(*http.Request) int { return 0 }), startRegistry(t, password)},
	} {
		free, locked := open(t, kind.free, registry.Options{}), open(t, kind.locked, login)
		host, _, _ := strings.Cut(kind.locked, "/")
		rows := []struct {
			name   string
			repo   *registry.Repository
			rule   licence.Rule
			refuse string // "" means no error
			hint   string
		}{
			{"on this machine", free, licence.Rule{}, "", ""},
			{"for everybody", free, licence.Rule{Addresses: lookupOf(internet)}, "it can be read without credentials",
				"--private " + kind.free},
			{"for everybody, marked", free, licence.Rule{Addresses: lookupOf(internet), Private: []string{kind.free}},
				"--private is wrong", "revoke public read"},
			{"marked, and one address of two is far", free,
				licence.Rule{Addresses: lookupOf(cluster, internet), Private: []string{kind.free}},
				"--private is wrong", "revoke public read"},
			{"for everybody in a cluster", free, licence.Rule{Addresses: lookupOf(cluster)},
				"it can be read without credentials", "--private"},
			{"for everybody in a cluster, marked", free,
				licence.Rule{Addresses: lookupOf(cluster), Private: []string{kind.free}}, "", ""},
			{"for everybody, nobody knows where, marked", free, licence.Rule{Private: []string{kind.free},
				Addresses: func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no such host") }},
				"--private is wrong", "revoke public read"},
			{"for who has the password", locked, licence.Rule{Addresses: lookupOf(internet)}, "it is not marked private",
				"only you can read the destination, add --private " + kind.locked},
			{"for who has the password, marked", locked,
				licence.Rule{Addresses: lookupOf(internet), Private: []string{kind.locked}}, "", ""},
			{"the host marked", locked, licence.Rule{Addresses: lookupOf(internet), Private: []string{host + "/"}}, "", ""},
			{"another mark", locked, licence.Rule{Addresses: lookupOf(internet),
				Private: []string{kind.locked + "s", host + "/pre", ""}}, "it is not marked private", "--private"},
		}
		for _, row := range rows {
			t.Run(kind.name+" "+row.name, func(t *testing.T) {
				t.Parallel()
				for _, f := range []target.Flavour{target.Open, target.Proprietary} {
					err := row.rule.Check(t.Context(), row.repo.Name(), row.repo, f)
					if row.refuse == "" {
						if err != nil {
							t.Errorf("Check(%s) = %v; want none", f, err)
						}
						continue
					}
					word := map[target.Flavour]string{target.Open: "--redistribute userspace",
						target.Proprietary: "--redistribute all"}[f]
					if !fault.Is(err, fault.PublishRefused) || !strings.Contains(err.Error(), row.refuse) ||
						!strings.Contains(fault.Hint(err), row.hint) || !strings.HasSuffix(fault.Hint(err), word) {
						t.Errorf("Check(%s) = %v, hint %q; want %q, hint with %q and %q", f, err, fault.Hint(err), row.refuse, row.hint,
							word)
					}
				}
			})
		}
	}
}

func TestWhatTheOperatorSays(t *testing.T) {
	t.Parallel()
	repo := open(t, distribution.Start(t)+"/prebake/driver", registry.Options{})
	for _, row := range []struct {
		says              bundle.Redistribution
		open, proprietary bool
	}{{"", false, false}, {bundle.RedistributeNone, false, false}, {bundle.RedistributeUserspace, true, false},
		{bundle.RedistributeAll, true, true}} {
		rule := licence.Rule{Redistribute: row.says, Addresses: lookupOf(internet)}
		for f, want := range map[target.Flavour]bool{target.Open: row.open, target.Proprietary: row.proprietary} {
			if err := rule.Check(t.Context(), repo.Name(), repo, f); (err == nil) != want {
				t.Errorf("--redistribute %q: Check(%s) = %v; want allowed %t", row.says, f, err, want)
			}
		}
	}
}

// TestWhatTheServerSays has a Prebake server that everybody on the internet can read. The server counts as private only
// if its audience header says so.
func TestWhatTheServerSays(t *testing.T) {
	t.Parallel()
	for word, public := range map[string]bool{registry.AudiencePrivate: false, registry.AudiencePublic: true,
		"secret": true} {
		inner := stock.New(stock.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set(registry.AudienceHeader, word)
			inner.ServeHTTP(w, r)
		}))
		t.Cleanup(srv.Close)
		repo := open(t, strings.TrimPrefix(srv.URL, "http://")+"/prebake/driver", registry.Options{})
		for _, rule := range []licence.Rule{{Addresses: lookupOf(internet)},
			{Addresses: lookupOf(internet), Private: []string{repo.Name()}}} {
			if got, err := rule.Audience(t.Context(), repo.Name(), repo); err != nil || got.Public != public {
				t.Errorf("a server that says %q: Audience = %s, %v; want public %t", word, got, err, public)
			}
		}
	}
}

// TestPublishedForEverybody has a registry that hides its list of tags from clients without credentials, but serves an
// artifact to any client that knows its name. After the push, Published must refuse this registry.
func TestPublishedForEverybody(t *testing.T) {
	t.Parallel()
	secret := false
	ref := startRegistry(t, func(r *http.Request) int {
		if (strings.HasSuffix(r.URL.Path, "/tags/list") || secret) && password(r) != 0 {
			return http.StatusForbidden
		}
		return 0
	})
	repo := open(t, ref, registry.Options{})
	digest := push(t, repo)
	rule := licence.Rule{Addresses: lookupOf(internet), Private: []string{ref}}
	if err := rule.Check(t.Context(), ref, repo, target.Open); err != nil {
		t.Fatalf("Check = %v; want none: outsiders may not list it", err)
	}
	err := rule.Published(t.Context(), ref, repo, target.Open, digest)
	if !fault.Is(err, fault.PublishRefused) || !strings.Contains(err.Error(), digest) || fault.Hint(err) == "" {
		t.Errorf("Published = %v, hint %q; want publish-refused with the digest, and what to do", err, fault.Hint(err))
	}
	for name, rule := range map[string]licence.Rule{
		"in a cluster": {Addresses: lookupOf(cluster), Private: []string{ref}}, "here": {Private: []string{ref}},
		"allowed": {Addresses: lookupOf(internet), Private: []string{ref}, Redistribute: bundle.RedistributeAll},
	} {
		if err := rule.Published(t.Context(), ref, repo, target.Open, digest); err != nil {
			t.Errorf("Published(%s) = %v; want none", name, err)
		}
	}
	secret = true
	if err := rule.Published(t.Context(), ref, repo, target.Open, digest); err != nil {
		t.Errorf("Published(refused to outsiders) = %v; want none", err)
	}
}

// TestNoAnswer checks that Check returns an error if it cannot examine the registry. Such a registry must not count as
// private.
func TestNoAnswer(t *testing.T) {
	t.Parallel()
	ref := startRegistry(t, func(*http.Request) int { return http.StatusMethodNotAllowed })
	rule := licence.Rule{Addresses: lookupOf(internet)}
	if err := rule.Check(t.Context(), ref, open(t, ref, registry.Options{}), target.Open); err == nil {
		t.Error("Check(405 to everything) = nil; want an error")
	}
	srv := httptest.NewServer(nil)
	gone := strings.TrimPrefix(srv.URL, "http://") + "/prebake/driver"
	srv.Close()
	if err := rule.Check(t.Context(), gone, open(t, gone, registry.Options{}), target.Open); !fault.Is(err,
		fault.Transient) {
		t.Errorf("Check(nobody there) = %v; want kind transient", err)
	}
}

func TestFolders(t *testing.T) {
	t.Parallel()
	layout := open(t, "oci:"+t.TempDir(), registry.Options{})
	if err := (licence.Rule{}).Check(t.Context(), layout.Name(), layout, target.Proprietary); err != nil {
		t.Errorf("Check(layout) = %v; want none", err)
	}
	b, err := tarball.Open(t.Context(), "file://"+t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join((licence.Rule{}).Check(t.Context(), b.URL(""), b, target.Proprietary), b.Close()); err != nil {
		t.Errorf("Check(folder) = %v; want none", err)
	}
}

// TestBuckets uses an emulator of Google's storage, which grants all rights to everybody. So its bucket is public.
func TestBuckets(t *testing.T) {
	s := gcs.Start(t)
	s.Use(t)
	s.Bucket(t, "drivers")
	b, err := tarball.Open(t.Context(), "gs://drivers/cos/")
	if err != nil {
		t.Fatal(err)
	}
	missing, err := tarball.Open(t.Context(), "gs://no-such-bucket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(b.Close(), missing.Close()); err != nil {
			t.Error(err)
		}
	})
	s.Put(t, "drivers", "cos/x", []byte("x"))
	for _, row := range []struct {
		name string
		b    *tarball.Bucket
		rule licence.Rule
		want string
	}{
		{"the emulator of this machine", b, licence.Rule{}, "private: it is on this machine"},
		{"not marked", b, licence.Rule{Addresses: lookupOf(internet)}, "public: it can be read without credentials"},
		{"marked", b, licence.Rule{Addresses: lookupOf(internet), Private: []string{"gs://drivers"}},
			"public: it can be read without credentials, so --private is wrong"},
		{"no bucket, marked", missing, licence.Rule{Addresses: lookupOf(internet), Private: []string{"gs://no-such-bucket"}},
			"private: --private says so"},
	} {
		if got, err := row.rule.Audience(t.Context(), row.b.URL(""), row.b); err != nil || got.String() != row.want {
			t.Errorf("%s: Audience = %s, %v; want %s", row.name, got, err, row.want)
		}
	}
	for name, reads := range map[string]bool{"x": true, "y": false} {
		if got, err := b.AnonymousAccess(t.Context(), name); err != nil || got.Reads != reads {
			t.Errorf("AnonymousAccess(%s) = %+v, %v; want reads %t", name, got, err, reads)
		}
	}
}
