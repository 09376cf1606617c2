package catalogue

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Input from callers with a token is checked, too: it appears on pages and in commands that people copy.

// Limits of one artifact and one update.
const (
	maxLine    = 4 << 10 // bytes of one field
	maxPhases  = 200
	maxKernels = 1000 // kernels that one call may add to an artifact
)

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func badDigest(digest string) error {
	return fault.New(fault.Usage, fmt.Sprintf("digest %.80q: want sha256: and 64 lower-case hex digits", digest),
		"take the digest from the list of artifacts: server artifacts")
}

// checkLine returns an error if a text is longer than maxLine, or has a control character such as a line break.
func checkLine(what, text string) error {
	if len(text) > maxLine {
		return fmt.Errorf("%s is longer than %d bytes", what, maxLine)
	}
	if strings.ContainsFunc(text, unicode.IsControl) {
		return fmt.Errorf("%s %.80q: want one line without control characters", what, text)
	}
	return nil
}

// maxClass is the maximum length of the name of a class of failures, in bytes.
const maxClass = 40

// classPattern matches the names of classes of failures.
var classPattern = regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)

// CheckClass returns an error unless a text may be the name of a class of failures. Builders and nodes may be newer
// than this server, so the class need not be one of package fault.
func CheckClass(class string) error {
	if len(class) > maxClass || !classPattern.MatchString(class) {
		return fmt.Errorf("class %.80q: want 1 to %d lower-case letters and hyphens", class, maxClass)
	}
	return nil
}

// pathPattern matches a repository's name, as the OCI distribution specification defines it ("Pulling manifests").
var pathPattern = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

// hostPattern matches a registry's host and port. It is strict, because the host appears in commands that people paste.
var hostPattern = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?$`)

// checkRepository returns an error unless the repository is a path on this server (/prebake/driver), or a repository of
// another registry.
func checkRepository(repository string) error {
	host, path, _ := strings.Cut(repository, "/")
	if host == "" {
		host = "localhost"
	}
	_, err := name.NewRegistry(host)
	if len(repository) > 255 || err != nil || !hostPattern.MatchString(host) || !pathPattern.MatchString(path) {
		return fmt.Errorf("repository %.80q: want /NAME on this server, or HOST/NAME", repository)
	}
	return nil
}

// checkArtifact checks every field of an artifact. It sets the architecture of artifact and kernels from their boards.
func checkArtifact(a *api.Artifact) error {
	if !digestPattern.MatchString(a.Digest) {
		return badDigest(a.Digest)
	}
	if _, err := target.ParseFingerprint(string(a.Fingerprint)); err != nil {
		return err
	}
	if _, err := target.ParseDriver(a.Driver.Version, string(a.Driver.Flavour)); err != nil {
		return err
	}
	if err := checkRepository(a.Repository); err != nil {
		return err
	}
	if n := len(a.Kernels); n == 0 || n > maxKernels {
		return fmt.Errorf("the artifact is for %d kernels; want 1 to %d kernels", n, maxKernels)
	}
	if err := (target.Kernel{BuildID: a.Kernels[0].BuildID, Board: a.Kernels[0].Board,
		Release: a.Release}).Check(); err != nil {
		return err
	}
	for i, k := range a.Kernels {
		if err := k.Check(); err != nil {
			return err
		}
		arch := target.BoardArch(k.Board)
		if a.Arch == "" {
			a.Arch = arch
		}
		if a.Arch != arch {
			return fmt.Errorf("the artifact is for architecture %s, but kernel %s has architecture %s", a.Arch, k, arch)
		}
		a.Kernels[i].Arch = arch
	}
	return nil
}
