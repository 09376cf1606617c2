package pipeline

import (
	"encoding/json"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/registry"
)

// The cache stores what this machine attached to an artifact in a repository: the digests of the newest maxAttached
// manifests, the newest last.
const (
	attachedKind = "attached-v1"
	maxAttached  = 256
)

// RegistryOptions returns the settings for one of the Destinations. With these settings, a client first reads what this
// machine attached to an artifact. Without them, another user who may push could attach more to the artifact than a
// client reads. This run would then not find its own statements, and would build the published artifact again each
// time.
func (c Config) RegistryOptions(destination string) registry.Options {
	o := registry.Options{}
	if c.Registry != nil {
		o = c.Registry(destination)
	}
	key := func(subject string) string {
		return cas.NewKey(attachedKind).Add("repository", destination).Add("subject", subject).String()
	}
	o.Own = func(subject string) (digests []string) {
		if raw, ok := c.Cache.Fact(attachedKind, key(subject)); !ok || json.Unmarshal(raw, &digests) != nil {
			return nil
		}
		return digests
	}
	o.Attached = func(subject, digest string) {
		known := o.Own(subject)
		all := make([]string, 0, len(known)+1)
		for _, d := range known {
			if d != digest {
				all = append(all, d)
			}
		}
		all = append(all, digest)
		// Errors are ignored, and an entry that another process adds at the same time may be lost. An attachment
		// without an entry is found in the repository's list, like the attachments of others.
		if raw, err := json.Marshal(all[max(0, len(all)-maxAttached):]); err == nil {
			_ = c.Cache.PutFact(attachedKind, key(subject), raw)
		}
	}
	return o
}
