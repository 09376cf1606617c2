package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/pkg/fault"
)

// CheckPush opens ref and calls [Repository.CheckPush].
func CheckPush(ctx context.Context, ref string, o Options) error {
	r, err := Open(ref, o)
	if err != nil {
		return err
	}
	return r.CheckPush(ctx)
}

func (s *remoteStore) checkPush(ctx context.Context) error {
	tr := contextTransport{ctx, s.transport}
	return s.writeError(ctx, remote.CheckPushPermission(s.repo.Tag("prebake-doctor"), s.keys, tr))
}

func (s *layoutStore) checkPush(context.Context) error {
	if s.dir == "" {
		return readOnly()
	}
	return checkFolder(s.dir)
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
		return fault.Disk(fault.Wrap(fault.Usage, fmt.Errorf("write to %s: %w", dir, err),
			"choose a folder that this user may write to"), "free space on the disk of "+dir)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// fixedKeychain has the same credentials for every registry.
type fixedKeychain struct{ authn.Authenticator }

func (f fixedKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return f.Authenticator, nil
}

// contextTransport sends requests with its own context, because the library's CheckPushPermission takes none.
type contextTransport struct {
	ctx  context.Context // replaces the context of each request
	next http.RoundTripper
}

func (w contextTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	return w.next.RoundTrip(r.WithContext(w.ctx))
}
