package bundle

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// Identity is what the annotations of a manifest say about the artifact. The identity and the signed statements
// together decide whether the artifact fits a node.
type Identity struct {
	Fingerprint target.Fingerprint
	Arch        target.Arch
	// Release is `uname -r` of the kernels with this fingerprint.
	Release string
	// Vermagic is the string that the kernel compares when it loads a module.
	Vermagic string
	Driver   target.Driver
}

// Bounds on the fields with free text. A release has at most 64 bytes in struct utsname. A vermagic is a release and a
// few words.
var (
	releasePattern  = regexp.MustCompile(`^[!-~]{1,64}$`)
	vermagicPattern = regexp.MustCompile(`^[ -~]{1,256}$`)
)

func (id Identity) validate() error {
	if _, err := target.ParseFingerprint(string(id.Fingerprint)); err != nil {
		return err
	}
	if id.Arch != target.AMD64 && id.Arch != target.ARM64 {
		return fmt.Errorf("architecture %q: want amd64 or arm64", id.Arch)
	}
	if !releasePattern.MatchString(id.Release) {
		return fmt.Errorf("kernel release %q: want 1 to 64 printable characters", id.Release)
	}
	if !vermagicPattern.MatchString(id.Vermagic) {
		return fmt.Errorf("vermagic %q: want 1 to 256 printable characters", id.Vermagic)
	}
	_, err := target.ParseDriver(id.Driver.Version, string(id.Driver.Flavour))
	return err
}

// Annotations returns the identity as the annotations of a manifest.
func (id Identity) Annotations() map[string]string {
	return map[string]string{
		AnnotationFormat:        FormatVersion,
		AnnotationFingerprint:   string(id.Fingerprint),
		AnnotationRelease:       id.Release,
		AnnotationVermagic:      id.Vermagic,
		AnnotationArch:          string(id.Arch),
		AnnotationDriverVersion: id.Driver.Version,
		AnnotationDriverFlavour: string(id.Driver.Flavour),
	}
}

// parseIdentity parses the identity in a manifest's annotations. Every annotation of an identity is required. Other
// annotations are ignored.
func parseIdentity(annotations map[string]string) (Identity, error) {
	switch v, ok := annotations[AnnotationFormat]; {
	case !ok:
		return Identity{}, fault.New(fault.Unverified,
			"read artifact identity: this is not a Prebake artifact, because it has no annotation "+AnnotationFormat, "")
	case v != FormatVersion:
		return Identity{}, fault.New(fault.Unverified,
			fmt.Sprintf("read artifact identity: the artifact has format %q; this program reads only format %s", v,
				FormatVersion),
			"update this program")
	}
	id := Identity{
		Fingerprint: target.Fingerprint(annotations[AnnotationFingerprint]),
		Arch:        target.Arch(annotations[AnnotationArch]),
		Release:     annotations[AnnotationRelease],
		Vermagic:    annotations[AnnotationVermagic],
		Driver: target.Driver{
			Version: annotations[AnnotationDriverVersion],
			Flavour: target.Flavour(annotations[AnnotationDriverFlavour]),
		},
	}
	if err := id.validate(); err != nil {
		return Identity{}, fault.Errorf(fault.Unverified, "read artifact identity: %w", err)
	}
	return id, nil
}

// Tag returns the tag of an artifact: the driver's version and flavour, and the fingerprint's first digits. A program
// that finds an artifact by its tag must still compare the whole identity.
func Tag(id Identity) string {
	return id.Driver.String() + "-" + id.Fingerprint.Short()
}

// KernelTag returns the tag by which a node without a server finds the artifact for its COS build.
func KernelTag(k target.Kernel, d target.Driver) string {
	return strings.Join([]string{"cos", k.BuildID, k.Board, d.String()}, "-")
}
