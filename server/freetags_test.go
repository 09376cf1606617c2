package main

import (
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestFreeTags replaces a published artifact, as an operator does after the kernel headers of a mirror were corrected.
// The registry must refuse the new artifact until the operator frees the old one's tags, and must name the command for
// that.
func TestFreeTags(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, _, _ := start(t, dir)
	as := []remote.Option{remote.WithContext(t.Context()),
		remote.WithAuth(&authn.Basic{Username: "x", Password: secretOf(t, dir)})}
	repository, err := name.NewRepository(strings.TrimPrefix(url, "http://")+"/prebake/driver", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	var images []v1.Image
	var digests []string
	for range 3 {
		img, err := random.Image(1024, 1)
		if err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		images, digests = append(images, img), append(digests, d.String())
	}
	push := func(tag string, image int) error { return remote.Write(repository.Tag(tag), images[image], as...) }
	denied := func(when string, err error, part string) {
		t.Helper()
		var te *transport.Error
		if !errors.As(err, &te) || te.StatusCode != http.StatusForbidden || !strings.Contains(err.Error(), part) {
			t.Errorf("%s: push = %v; want 403 with %q", when, err, part)
		}
	}
	for tag, image := range map[string]int{"kernel": 0, "fingerprint": 0, "another": 1} {
		if err := push(tag, image); err != nil {
			t.Fatal(err)
		}
	}
	free := []string{"free-tags", "--server", url, "--token-file", filepath.Join(dir, "token"), digests[0]}
	if code, out, errs := run(t, free...); code != fault.NotFound.ExitCode() {
		t.Errorf("free-tags before the deletion = %d\n%s%s\nwant %d", code, out, errs, fault.NotFound.ExitCode())
	}
	denied("before the deletion", push("kernel", 2), "create-only")
	for _, d := range digests[:2] {
		if err := remote.Delete(repository.Digest(d), as...); err != nil {
			t.Fatal(err)
		}
	}
	denied("after the deletion", push("kernel", 2), "server free-tags "+digests[0])
	code, out, errs := run(t, free...)
	if want := "prebake/driver:fingerprint\nprebake/driver:kernel\n"; code != 0 || out != want {
		t.Errorf("free-tags = %d\n%s%s\nwant\n%s", code, out, errs, want)
	}
	for _, tag := range []string{"kernel", "fingerprint"} {
		if err := push(tag, 2); err != nil {
			t.Errorf("push to %s, which is free = %v", tag, err)
		}
	}
	denied("the freed tag again", push("kernel", 1), "create-only")
	denied("the other deleted artifact's tag", push("another", 2), digests[1])
	entries, err := api.NewClient(url, secretOf(t, dir), nil).Audit(t.Context(), "")
	if path := "/v1/artifacts/" + digests[0] + "/free-tags"; err != nil || len(entries) == 0 || !audited(entries, path) {
		t.Errorf("Audit() = %v, %v; want an entry with %s", entries, err, path)
	}
}

func audited(all []api.AuditEntry, path string) bool {
	for _, e := range all {
		if e.Path == path && e.Status == http.StatusOK {
			return true
		}
	}
	return false
}
