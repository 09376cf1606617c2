// Package licence decides whether an artifact may go to a destination. Files under NVIDIA's licence may go to private
// destinations, and to public ones only if the operator allows it. docs/decisions/0031 explains NVIDIA's licence.
//
// The package does not interpret the licence. For a destination that everybody can read over the internet, --private
// has no effect. A Prebake server that calls itself private counts as private, even if everybody can read there: the
// operator of that server must keep others away from it.
package licence

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
)

// Rule is the operator's decision. With the zero value, files under NVIDIA's licence may go only to this machine and to
// Prebake servers that call themselves private.
type Rule struct {
	// Redistribute says which files may go everywhere. "" means [bundle.RedistributeNone].
	Redistribute bundle.Redistribution
	// Private lists destinations that the operator marks as private. An entry also covers every destination whose name
	// continues the entry with a slash.
	Private []string
	// Addresses looks up a host's addresses. If nil, the system's resolver is used.
	Addresses func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Destination examines a destination as a client without credentials sees it.
type Destination interface {
	// AnonymousAccess checks whether a client without credentials can read the artifact with this tag or digest. With "",
	// it checks the destination in general.
	AnonymousAccess(ctx context.Context, what string) (registry.AnonymousAccess, error)
}

// Audience says who can read a destination.
type Audience struct {
	Public bool
	// Reason is a clause that completes a sentence, such as "it is on this machine".
	Reason string
	// marked is true if the destination is private only because the operator says so.
	marked bool
	// hint says how to make a public destination private.
	hint string
}

// String returns "public: " or "private: ", and the reason.
func (a Audience) String() string {
	if a.Public {
		return "public: " + a.Reason
	}
	return "private: " + a.Reason
}

// Audience decides whether a destination is private or public. These are private:
//
//   - a folder, and a registry on this machine;
//   - a Prebake server that calls itself private;
//   - a destination that the operator marks as private, unless everybody can read it over the internet.
func (r Rule) Audience(ctx context.Context, name string, p Destination) (Audience, error) {
	seen, err := p.AnonymousAccess(ctx, "")
	if err != nil {
		return Audience{}, fmt.Errorf("read %s without credentials: %w", name, err)
	}
	switch {
	case seen.Host == "":
		return Audience{Reason: "it is a folder"}, nil
	case seen.Visibility == registry.AudiencePublic:
		return Audience{Public: true, Reason: "the server says so", hint: "publish to a private destination"}, nil
	case seen.Visibility == registry.AudiencePrivate:
		return Audience{Reason: "the server says so"}, nil
	}
	internal, local := r.hostNetwork(ctx, seen.Host)
	switch {
	case local:
		return Audience{Reason: "it is on this machine"}, nil
	case !r.markedPrivate(name) && seen.Reads:
		return Audience{Public: true, Reason: "it can be read without credentials",
			hint: "revoke public read access to the destination, and add --private " + name}, nil
	case !r.markedPrivate(name):
		return Audience{Public: true, Reason: "it is not marked private",
			hint: "if only you can read the destination, add --private " + name}, nil
	case seen.Reads && !internal:
		return Audience{Public: true, Reason: "it can be read without credentials, so --private is wrong",
			hint: "revoke public read access to the destination"}, nil
	}
	return Audience{Reason: "--private says so", marked: true}, nil
}

// markedPrivate reports whether the operator marked a destination as private.
func (r Rule) markedPrivate(name string) bool {
	for _, p := range r.Private {
		if p = strings.TrimSuffix(p, "/"); p != "" && (name == p || strings.HasPrefix(name, p+"/")) {
			return true
		}
	}
	return false
}

// lookupTimeout is the time limit of the look-up of a host's addresses.
const lookupTimeout = 10 * time.Second

// hostNetwork classifies a host by its addresses. internal is true if the internet can reach none of them. local is
// true if all of them belong to this machine. Both are false if the name cannot be resolved, for example behind a
// proxy.
func (r Rule) hostNetwork(ctx context.Context, hostport string) (internal, local bool) {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	find := r.Addresses
	if find == nil {
		find = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	all, err := find(ctx, strings.Trim(host, "[]"))
	internal, local = err == nil && len(all) > 0, err == nil && len(all) > 0
	shared := netip.MustParsePrefix("100.64.0.0/10") // RFC 6598; the internet cannot reach these addresses
	for _, a := range all {
		a = a.Unmap()
		local = local && a.IsLoopback()
		internal = internal && (a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || shared.Contains(a))
	}
	return internal, local
}

// Check returns a [fault.PublishRefused] error if artifacts of this flavour may not go to a destination. Call it before
// the build.
func (r Rule) Check(ctx context.Context, name string, p Destination, f target.Flavour) error {
	need := bundle.LicenceOf(f).Redistribution
	if r.Redistribute.Covers(need) {
		return nil
	}
	who, err := r.Audience(ctx, name, p)
	if err != nil || !who.Public {
		return err
	}
	return refuse(name, f, who, need)
}

// Published repeats the check after an artifact was published to a destination that the operator marked as private. If
// a client without credentials can read the artifact over the internet, the error is [fault.PublishRefused].
// Destinations that are private for another reason are not examined.
func (r Rule) Published(ctx context.Context, name string, p Destination, f target.Flavour, what string) error {
	need := bundle.LicenceOf(f).Redistribution
	if r.Redistribute.Covers(need) || !r.markedPrivate(name) {
		return nil
	}
	who, err := r.Audience(ctx, name, p)
	if err != nil || !who.marked && !who.Public {
		return err
	}
	seen, err := p.AnonymousAccess(ctx, what)
	if err != nil {
		return fmt.Errorf("read %s in %s without credentials: %w", what, name, err)
	}
	if internal, _ := r.hostNetwork(ctx, seen.Host); seen.Reads && !internal {
		return fault.New(fault.PublishRefused,
			fmt.Sprintf("%s is in %s now, and can be read without credentials", what, name),
			"remove the artifact from the destination, or revoke public read access to the destination; then publish again")
	}
	return nil
}

func refuse(name string, f target.Flavour, who Audience, need bundle.Redistribution) error {
	what := "the user space and firmware of the open flavour are"
	if f != target.Open {
		what = "modules, user space and firmware are"
	}
	return fault.New(
		fault.PublishRefused,
		fmt.Sprintf(
			"%s artifacts may not go to %s: %s under NVIDIA's licence, and the destination is %s",
			f,
			name,
			what,
			who,
		),
		who.hint+fmt.Sprintf("; if you may pass on what NVIDIA's licence covers, add --redistribute %s", need),
	)
}
