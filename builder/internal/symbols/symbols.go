// Package symbols publishes the debug symbols of a driver's modules for people who analyse a crash dump. The symbols
// are an artifact of their own that refers to the driver's artifact. No node fetches them.
//
// The package refuses symbols of other modules than the published ones. It never replaces published symbols.
package symbols

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// ArtifactType is the artifact type of the referrer with a driver's symbols.
const ArtifactType = "application/vnd.prebake.debug-symbols.v1"

// Folder is the folder of the files in the layer. gdb, crash, perf and drgn look for symbols by build id in this
// folder.
const Folder = "usr/lib/debug/.build-id"

// PredicateType is the type of the statement that says to which driver the symbols belong.
const PredicateType = "https://prebake.dev/debug-symbols/v1"

// Facts is the predicate of type PredicateType.
type Facts struct {
	// Artifact is the manifest digest of the driver.
	Artifact    string             `json:"artifact"`
	Driver      target.Driver      `json:"driver"`
	Fingerprint target.Fingerprint `json:"fingerprint"`
	// Modules has the build ids of the modules, by the module's name.
	Modules map[string]string `json:"modules"`
}

// Set has the symbols of one artifact.
type Set struct {
	Identity bundle.Identity
	// Debug and Published map module names to files. Debug has files with debug information, and Published has the
	// artifact's modules. Both files of a module must have the same build id.
	Debug, Published map[string]string
	// Recipe is the recipe for the layer, see [bundle.PackLayerAs]. "" means [bundle.PackRecipe].
	Recipe string
	// Signer signs the statement about the symbols.
	Signer *sign.Signer
	// Verifier verifies attached statements. If nil, only Signer's key is trusted.
	Verifier *trust.Verifier
	// Scratch is the folder in which the layer is made, or "" for the system's temporary folder.
	Scratch string
}

// Publish attaches the symbols to the artifact with this manifest digest, and a signed statement to the symbols. It
// returns the manifest of the symbols, and whether both were attached before. If a trusted signer attached other
// symbols, the error is [fault.PublishRefused].
func Publish(ctx context.Context, repo *registry.Repository, digest string, s Set) (d v1.Descriptor, existed bool,
	err error) {
	d, existed, err = s.publish(ctx, repo, digest)
	if err != nil {
		return v1.Descriptor{}, false, fmt.Errorf("publish debug symbols of %s: %w", digest, err)
	}
	return d, existed, nil
}

func (s Set) publish(ctx context.Context, repo *registry.Repository, digest string) (d v1.Descriptor, existed bool,
	err error) {
	if s.Signer == nil {
		return d, false, fault.New(fault.Usage, "the signing key is missing", "give a signing key with --key")
	}
	if s.Verifier == nil {
		if s.Verifier, err = s.Signer.Verifier(); err != nil {
			return d, false, err
		}
	}
	subject, err := repo.Resolve(ctx, digest)
	if err != nil {
		return d, false, err
	}
	dir, err := os.MkdirTemp(s.Scratch, "prebake-symbols-")
	if err != nil {
		return d, false, fault.TempDisk(err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	packed, ids, err := s.pack(ctx, dir)
	if err != nil {
		return d, false, err
	}
	layer := v1.Descriptor{MediaType: bundle.MediaTypeLayer, Size: packed.Size}
	if layer.Digest, err = v1.NewHash(packed.Digest); err != nil {
		return d, false, err
	}
	if err := s.refuseOthers(ctx, repo, digest, layer); err != nil {
		return d, false, err
	}
	// Attach the layer even if the artifact has these symbols. An earlier run may have written the manifest, but not the
	// list of referrers.
	d, err = repo.AttachLayer(ctx, subject, ArtifactType, layer,
		func() (io.ReadCloser, error) { return os.Open(packed.Path) }, s.Identity.Annotations())
	if err != nil {
		return d, false, err
	}
	if existed, err = isSigned(ctx, repo, digest, d, s.Verifier); err != nil || existed {
		return d, existed, err
	}
	statement, err := sign.About("debug symbols of nvidia-"+s.Identity.Driver.String(), d.Digest.String(), PredicateType,
		Facts{Artifact: digest, Driver: s.Identity.Driver, Fingerprint: s.Identity.Fingerprint, Modules: ids})
	if err != nil {
		return d, false, err
	}
	raw, err := sign.Bundle(ctx, s.Signer, statement)
	if err != nil {
		return d, false, err
	}
	_, err = repo.Attach(ctx, d, trust.ArtifactTypeBundle, raw, trust.OfType(PredicateType))
	return d, false, err
}

// refuseOthers returns an error if the artifact has other symbols with a trusted signature.
func (s Set) refuseOthers(ctx context.Context, repo *registry.Repository, digest string, layer v1.Descriptor) error {
	return eachSigned(ctx, repo, digest, s.Verifier, func(d, l v1.Descriptor) (done bool, err error) {
		if l.Digest == layer.Digest {
			return false, nil
		}
		return true, fault.New(fault.PublishRefused,
			fmt.Sprintf("attach symbols to %s: the artifact already has other symbols, in manifest %s", digest, d.Digest),
			"compare the published symbols with the new ones: they should not differ, because two builds of one artifact give "+
				"the same symbols; if the published symbols are wrong, delete their manifest in the registry")
	})
}

// Have reports whether the repository has symbols of the artifact with this manifest digest: a trusted signer made
// them, and their layer is there.
func Have(ctx context.Context, repo *registry.Repository, digest string, v *trust.Verifier) (found bool, err error) {
	err = eachSigned(ctx, repo, digest, v, func(_, layer v1.Descriptor) (bool, error) {
		var err error
		found, err = repo.HasBlob(ctx, layer) // a registry may have lost a layer although it has the manifest
		if unusable(err) {
			return false, nil
		}
		return found, err
	})
	if err != nil {
		err = fmt.Errorf("look for debug symbols of %s: %w", digest, err)
	}
	return found, err
}

// maxListed is the maximum number of attached symbols that are examined. Builders attach one for each artifact, but
// others may attach anything.
const maxListed = 1024

// eachSigned calls f with the manifest and the layer of all symbols of an artifact that have a trusted signature, until
// f is done or returns an error. It skips all others, because anybody who may write to the repository can attach them.
// Those that this builder attached come first, see [registry.Options.Own].
func eachSigned(ctx context.Context, repo *registry.Repository, digest string, v *trust.Verifier,
	f func(manifest, layer v1.Descriptor) (done bool, err error)) error {
	have, err := repo.Referrers(ctx, digest, ArtifactType)
	if err != nil {
		return err
	}
	for _, d := range have[:min(len(have), maxListed)] {
		raw, err := repo.Manifest(ctx, d.Digest.String())
		if unusable(err) {
			continue
		}
		if err != nil {
			return err
		}
		layer, err := ParseManifest(raw)
		if err != nil {
			continue
		}
		done, err := isSigned(ctx, repo, digest, d, v)
		if unusable(err) { // whoever may push can make the list of its statements too long
			continue
		}
		if err == nil && done {
			done, err = f(d, layer)
		}
		if err != nil || done {
			return err
		}
	}
	return nil
}

// unusable reports whether the registry lacks what it lists, or serves other bytes.
func unusable(err error) bool {
	return fault.Is(err, fault.NoArtifact) || fault.Is(err, fault.Unverified)
}

// isSigned reports whether a trusted signer says that the symbols with this manifest belong to the artifact.
func isSigned(ctx context.Context, repo *registry.Repository, artifact string, d v1.Descriptor,
	v *trust.Verifier) (bool, error) {
	digest := d.Digest.String()
	attached, err := repo.AttachedIf(ctx, digest, trust.ArtifactTypeBundle, trust.Useful(v, digest),
		trust.OfType(PredicateType))
	return slices.ContainsFunc(v.Statements(attached, digest, PredicateType), func(st *trust.Statement) bool {
		var about Facts
		return json.Unmarshal(st.Predicate, &about) == nil && about.Artifact == artifact
	}), err
}

// pack copies or links the files into a tree by build id and packs the tree as a layer.
func (s Set) pack(ctx context.Context, dir string) (_ bundle.Layer, ids map[string]string, err error) {
	tree := filepath.Join(dir, "tree")
	ids = map[string]string{}
	if len(s.Debug) == 0 {
		return bundle.Layer{}, nil, fault.New(fault.Usage, "the build has no debug symbols", "build with --debug-symbols")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Debug)) {
		published, ok := s.Published[name]
		if !ok {
			return bundle.Layer{}, nil, fault.Errorf(fault.CheckFailed,
				"there are symbols of module %s, but the artifact has no such module", name)
		}
		want, err := buildID(published)
		if err != nil {
			return bundle.Layer{}, nil, err
		}
		got, err := buildID(s.Debug[name])
		if err != nil {
			return bundle.Layer{}, nil, err
		}
		if got != want {
			return bundle.Layer{}, nil, fault.Errorf(fault.CheckFailed,
				"the symbols of module %s have build id %s; the artifact's module has build id %s", name, got, want)
		}
		ids[name] = got
		if err := linkOrCopy(filepath.Join(tree, filepath.FromSlash(File(got))), s.Debug[name]); err != nil {
			return bundle.Layer{}, nil, fault.TempDisk(err)
		}
	}
	layer, err := bundle.PackLayerAs(ctx, cmp.Or(s.Recipe, bundle.PackRecipe), tree, bundle.LayerUserspace,
		filepath.Join(dir, "layer.tar.zst"))
	return layer, ids, err
}

// File returns the name of a module's symbols in the layer, by the module's build id in hex.
func File(buildID string) string { return Folder + "/" + buildID[:2] + "/" + buildID[2:] + ".debug" }

var idPattern = regexp.MustCompile(`^[0-9a-f]{8,128}$`)

func buildID(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	m, err := modinfo.Read(f, info.Size())
	if err != nil {
		return "", fmt.Errorf("read the build id of %s: %w", file, err)
	}
	if !idPattern.MatchString(m.BuildID) {
		return "", fault.Errorf(fault.CheckFailed, "%s has no build id, so a debugger cannot find its symbols", file)
	}
	return m.BuildID, nil
}

// linkOrCopy makes a file available under another name: by a hard link or, if that fails, as a copy.
func linkOrCopy(dst, src string) error {
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	if err := os.Link(src, dst); err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	return hostfile.Copy(dst, src)
}
