package pipeline

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
)

// A build because of age compiles everything again. If a destination then refuses the artifact, the published one stays
// old, and each further run would compile it again in vain. So the cache remembers the refusal for some time.
const (
	refusalKind = "refused-v1"
	// otherBytesFor is how long a build that gave other bytes than the published ones is remembered. deniedFor is how long
	// any other refusal is remembered. Its cause, such as a permission, is not among what the key covers.
	otherBytesFor = 7 * 24 * time.Hour
	deniedFor     = 24 * time.Hour
)

// refusal is what the cache remembers about a refused build.
type refusal struct {
	At    time.Time `json:"at"`
	For   int64     `json:"seconds"` // how long it counts
	Error string    `json:"error"`
	Hint  string    `json:"hint"`
}

// refusalKey returns the key of a refused build of the published artifact with this digest. It covers all that decides
// the bytes, and the destinations. An empty COS build stands for all COS builds with the same fingerprint.
func (r *run) refusalKey(in *inputs, to *publication, digest, cosBuild string) string {
	how, _ := r.cfg.Signing()
	key := cas.NewKey(refusalKind).Add("artifact", digest).Add("COS build", cosBuild).
		Add("modules", r.modulesKey(in).String()).Add("release", in.release.Digest).Add("recipes", fmt.Sprint(Recipes())).
		Add("version", r.cfg.Version).Add("signer", to.signer.String()).
		Add("module signer", fmt.Sprintf("%s, %+v", how, to.signing.expectedSigner(in))).
		Add("destinations", strings.Join(r.cfg.Destinations, "\n"))
	if in.google != nil {
		key.Add("Google's signatures", in.google.materials[0].Digest)
	}
	return key.String()
}

// checkRefused returns the error of an earlier build that a destination refused, as long as the cache remembers it. The
// digest is that of the published artifact.
func (r *run) checkRefused(in *inputs, to *publication, digest string) error {
	if r.cfg.RetryRefused {
		return nil
	}
	for _, cosBuild := range []string{"", in.kernel.Kernel.String()} {
		raw, ok := r.cfg.Cache.Fact(refusalKind, r.refusalKey(in, to, digest, cosBuild))
		var known refusal
		if !ok || json.Unmarshal(raw, &known) != nil {
			continue
		}
		until := known.At.Add(time.Duration(known.For) * time.Second)
		if r.started.Before(known.At) || !r.started.Before(until) { // before: the clock was wrong
			continue
		}
		return fault.New(fault.PublishRefused,
			fmt.Sprintf("artifact %s is not built again before %s, because that was refused at %s: %s", digest,
				until.Format(time.RFC3339), known.At.Format(time.RFC3339), known.Error),
			strings.TrimPrefix(known.Hint+"; to build it again now: --retry-failed", "; "))
	}
	return nil
}

// keepRefused makes the cache remember that a destination refused this build. Only a build because of age needs that:
// any other takes its modules from the cache.
func (r *run) keepRefused(in *inputs, to *publication, a *artifact, refused error) error {
	published := to.destinations[0].published // all have the same
	known := refusal{At: r.started, For: int64(deniedFor.Seconds()), Error: refused.Error(), Hint: fault.Hint(refused)}
	cosBuild := in.kernel.Kernel.String()
	if a.digest != published {
		known.For, cosBuild = int64(otherBytesFor.Seconds()), ""
	}
	raw, err := json.Marshal(known)
	if err != nil {
		return err
	}
	return r.cfg.Cache.PutFact(refusalKind, r.refusalKey(in, to, published, cosBuild), raw)
}
