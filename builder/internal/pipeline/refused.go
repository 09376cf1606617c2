package pipeline

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/builder/internal/loadtest"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/timeline"
)

// A renewal (see Config.RebuildAfter) compiles everything again. If it fails, or a destination refuses the new
// artifact, the published artifact stays old, and each further run would compile it again in vain. So the cache stores
// the failure for some time.
const (
	refusalKind = "refused-v1"
	// sureFor is how long a failure counts if the key covers its cause, such as a compile error, or bytes that differ
	// from the published ones. The time is limited, because the published artifact proves that its inputs compile: the
	// machine may have made a mistake. otherFor is how long any other failure counts, such as a denied upload, a
	// load test whose programs are missing, or a failed load test, whose virtual machine may have been too slow.
	sureFor  = 7 * 24 * time.Hour
	otherFor = 24 * time.Hour
)

// refusal is the cache's record of a failed renewal.
type refusal struct {
	At    time.Time  `json:"at"`
	For   int64      `json:"seconds"` // how long the failure counts
	Class fault.Kind `json:"class"`   // Internal in facts of earlier versions, which stored PublishRefused only
	Error string     `json:"error"`
	Hint  string     `json:"hint"`
}

// refusalKey returns the key of a failed renewal of the published artifact with this digest. The key covers everything
// that decides the bytes, and the destinations. If cosBuild is "", the failure is about all COS builds with the same
// fingerprint. tested has the settings of the load test, or is "" if the failure does not depend on them.
func (r *run) refusalKey(in *inputs, to *publication, digest, cosBuild, tested string) string {
	how, _ := r.cfg.Signing()
	key := cas.NewKey(refusalKind).Add("artifact", digest).Add("COS build", cosBuild).
		Add("modules", r.modulesKey(in).String()).Add("release", in.release.Digest).Add("recipes", fmt.Sprint(Recipes())).
		Add("version", r.cfg.Version).Add("signer", to.signer.String()).
		Add("module signer", fmt.Sprintf("%s, %+v", how, to.signing.expectedSigner(in))).
		Add("destinations", strings.Join(r.cfg.Destinations, "\n"))
	if in.google != nil {
		key.Add("Google's signatures", in.google.materials[0].Digest)
	}
	if tested != "" {
		key.Add("load test", tested)
	}
	return key.String()
}

// testSettings returns a text with what decides about the load test beside the modules, as far as it is known before
// the compile.
func (r *run) testSettings(in *inputs) string {
	return fmt.Sprintf("%s, mode %s, boot image %q, vmlinux %t", loadtest.Recipe, r.cfg.LoadTest, in.kernel.BootDigest,
		in.kernel.HasVMLinux)
}

// checkRefused returns the stored error of an earlier renewal that failed, as long as the failure counts. digest is the
// digest of the published artifact.
func (r *run) checkRefused(in *inputs, to *publication, digest string) error {
	for _, tested := range []string{"", r.testSettings(in)} {
		for _, cosBuild := range []string{"", in.kernel.Kernel.String()} {
			raw, ok := r.cfg.Cache.Fact(refusalKind, r.refusalKey(in, to, digest, cosBuild, tested))
			var known refusal
			if !ok || json.Unmarshal(raw, &known) != nil {
				continue
			}
			until := known.At.Add(time.Duration(known.For) * time.Second)
			if r.started.Before(known.At) || !r.started.Before(until) || known.At.Before(r.cfg.RetrySince) {
				continue // if r.started is before known.At, the clock was wrong
			}
			r.res.Remembered = true
			what := "failed"
			if known.Class = cmp.Or(known.Class, fault.PublishRefused); known.Class == fault.PublishRefused {
				what = "was refused"
			}
			return fault.New(known.Class,
				fmt.Sprintf("artifact %s is not built again before %s, because its last build %s at %s: %s", digest,
					until.Format(time.RFC3339), what, known.At.Format(time.RFC3339), known.Error),
				strings.TrimPrefix(known.Hint+"; to build it again now: --retry-failed", "; "))
		}
	}
	return nil
}

// keepRefused stores in the cache that this build failed. digest is the digest of the artifact that a destination
// refused, or "" if the build failed earlier. Only the failure of a renewal is stored, because any other build finds
// its modules in the cache. A failure that is probably short is not stored.
func (r *run) keepRefused(in *inputs, to *publication, digest string, failed error) {
	kind := fault.Of(failed)
	if !r.again {
		return
	}
	published := to.destinations[0].published // all have the same
	known := refusal{At: r.started, For: int64(otherFor.Seconds()), Class: kind, Error: failed.Error(),
		Hint: fault.Hint(failed)}
	cosBuild, tested := in.kernel.Kernel.String(), ""
	if digest == "" {
		tested = r.testSettings(in)
	}
	switch {
	case kind == fault.PublishRefused && digest != "" && digest != published:
		known.For, cosBuild = int64(sureFor.Seconds()), ""
	case kind == fault.APIBreak, kind == fault.CheckFailed, kind == fault.Unsupported:
		known.For = int64(sureFor.Seconds())
		if r.compileEnded(true) {
			cosBuild, tested = "", "" // COS builds with the same fingerprint share the compile
		}
	case kind == fault.PublishRefused, kind == fault.LoadTestFailed:
	case digest == "" && kind == fault.InputMissing:
	case kind == fault.Usage && r.compileEnded(false): // such as a load test without its programs
	default:
		return
	}
	raw, err := json.Marshal(known)
	if err == nil {
		err = r.cfg.Cache.PutFact(refusalKind, r.refusalKey(in, to, published, cosBuild, tested), raw)
	}
	if err != nil {
		fmt.Fprintf(r.log, "could not record this failure in the cache: %v\n", err)
	}
}

// compileEnded reports whether this build compiled, and whether that failed, as the argument says.
func (r *run) compileEnded(failed bool) bool {
	return slices.ContainsFunc(r.line.Phases(), func(p timeline.Phase) bool {
		return p.Name == "compile" && p.Of == "" && p.Failed == failed
	})
}
