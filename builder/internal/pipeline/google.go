package pipeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/gate"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// GoogleSignatures says what to do with the signatures that Google ships with a
// COS build. They replace the stamp: that would change the bytes that they are
// over.
type GoogleSignatures string

// The modes. With a module key of one's own, none of Google's is looked for.
const (
	// GoogleAuto attaches them where every one holds for what was compiled.
	GoogleAuto GoogleSignatures = "auto"
	// GoogleRequire fails the build where they are missing or do not hold.
	GoogleRequire GoogleSignatures = "require"
	// GoogleOff does not look for them.
	GoogleOff GoogleSignatures = "off"
)

// FactGoogleSignatures is the word under which the provenance names the archive
// whose signatures the modules carry, by digest.
const FactGoogleSignatures = "googleSignatures"

// googleSignatures are those of this run's COS build and driver.
type googleSignatures struct {
	*modsign.Detached
	materials []cossrc.Material // the archive first
	attached  bool
}

// fetchSignatures reads Google's signatures, where there are some and this
// build wants them.
func (r *run) fetchSignatures(ctx context.Context, kernels *cosbucket.Bucket) error {
	if r.cfg.ModuleKey != "" || r.cfg.GoogleSignatures == GoogleOff {
		return nil
	}
	s, err := cossrc.FetchSignatures(ctx, kernels, r.cfg.Cache, r.kernel.Kernel, r.res.Driver.Version)
	if err != nil {
		return err
	}
	if s == nil {
		if r.cfg.GoogleSignatures != GoogleRequire {
			return nil
		}
		archive := cosbucket.SignatureNames(r.kernel.Kernel, r.res.Driver.Version)[0]
		return fault.New(fault.InputMissing, "the bucket has no signatures by Google for this driver: there is no "+kernels.URL(archive),
			"name a bucket that has them with --kernel-mirror, or build with --google-signatures auto")
	}
	detached, err := modsign.ReadDetached(bytes.NewReader(s.Archive), s.TrustedKey)
	if err != nil {
		return fmt.Errorf("%s: %w", s.Materials[0].URI, err)
	}
	r.google = &googleSignatures{Detached: detached, materials: s.Materials}
	return nil
}

// attachSignatures puts modules with Google's signatures in the place of
// stamped ones: all of them, or none.
func (r *run) attachSignatures(ctx context.Context) (string, error) {
	cached, err := r.signEach(ctx, func(src, dst, name string) error {
		module, err := gate.Unstamped(src)
		if err != nil {
			return err
		}
		return r.google.Attach(dst, name, module)
	})
	switch {
	case errors.Is(err, modsign.ErrLeftOut) && r.cfg.GoogleSignatures != GoogleRequire:
		fmt.Fprintln(r.log, err)
		return err.Error(), nil
	case errors.Is(err, modsign.ErrLeftOut):
		return "", fault.Wrap(fault.CheckFailed, err, "publish the modules without them: --google-signatures auto")
	case err != nil:
		return "", err
	}
	r.google.attached = true
	note := fmt.Sprintf("%d of Google's signatures", len(r.modules))
	if cached {
		note += ", cached"
	}
	return note, nil
}

// carries says whose signatures the modules of an artifact carry, as its
// provenance names them; "" is nobody's.
type carries struct {
	key    string // the certificate of the farm's own key
	google string // the digest of Google's archive
}

func (r *run) carries() carries {
	switch {
	case r.moduleSigner != nil:
		return carries{key: r.moduleSigner.Identity()}
	case r.google != nil && r.google.attached:
		return carries{google: r.google.materials[0].Digest}
	}
	return carries{}
}

// takes reports whether an artifact with such modules is what this run is
// asked for. What Google signed for a sibling build is as good as unsigned.
func (r *run) takes(c carries) bool {
	switch {
	case r.moduleSigner != nil || r.cfg.GoogleSignatures == GoogleOff:
		return c == r.carries()
	case r.cfg.GoogleSignatures == GoogleRequire:
		return c == carries{google: r.google.materials[0].Digest}
	}
	return c.key == ""
}

func (c carries) String() string {
	switch {
	case c.key != "":
		return "signed under certificate " + c.key
	case c.google != "":
		return "signed by Google, in archive " + c.google
	}
	return "unsigned"
}
