package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/pkg/fault"
)

// CheckPush reports whether a repository may be written, and leaves nothing
// behind: a registry is asked for an upload that is called off at once, and in a
// layout's folder, or where it is to be made, a file is made and removed.
func CheckPush(ctx context.Context, ref string, o Options) error {
	if _, err := Open(ref, o); err != nil {
		return err
	}
	if dir, ok := strings.CutPrefix(ref, "oci:"); ok {
		return checkFolder(dir)
	}
	parse := []name.Option{name.StrictValidation}
	if o.Plain {
		parse = append(parse, name.Insecure)
	}
	repo, err := name.NewRepository(ref, parse...)
	if err != nil {
		return fault.Wrap(fault.Usage, err, "name it HOST[:PORT]/NAME")
	}
	var keys authn.Keychain = authn.DefaultKeychain
	switch {
	case o.Password != "":
		user := o.Username
		if user == "" {
			user = "token"
		}
		keys = fixed{authn.FromConfig(authn.AuthConfig{Username: user, Password: o.Password})}
	case o.Keychain != nil:
		keys = o.Keychain
	}
	tr := o.Transport
	if tr == nil {
		tr = remote.DefaultTransport
	}
	err = remote.CheckPushPermission(repo.Tag("prebake-doctor"), keys, within{ctx, tr})
	if err = (&remoteStore{repo: repo}).writing(ctx, err); err != nil {
		return fmt.Errorf("try to write %s: %w", ref, err)
	}
	return nil
}

func checkFolder(dir string) error {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			break
		}
		dir = filepath.Dir(dir)
	}
	f, err := os.CreateTemp(dir, ".prebake-doctor-*")
	if err != nil {
		return fault.Disk(fault.Wrap(fault.Usage, fmt.Errorf("write to %s: %w", dir, err), "name a folder that this user may write"), "free space on the disk of "+dir)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// fixed has the same credentials for all.
type fixed struct{ authn.Authenticator }

func (f fixed) Resolve(authn.Resource) (authn.Authenticator, error) { return f.Authenticator, nil }

// within ends requests with a context that the library does not take.
type within struct {
	ctx  context.Context // see above
	next http.RoundTripper
}

func (w within) RoundTrip(r *http.Request) (*http.Response, error) {
	return w.next.RoundTrip(r.WithContext(w.ctx))
}
