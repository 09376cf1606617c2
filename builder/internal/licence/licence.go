// Package licence decides whether an artifact may go to a destination: what is under
// NVIDIA's licence goes only to destinations that are private, unless the operator says
// otherwise. docs/decisions/0031 tells what that licence says.
//
// It refuses to interpret the licence, and to take a mark for true that a request without credentials proves wrong. The
// word of a server of ours it takes as it is: one that says private counts as private although everybody who reaches it
// can read there, also over the internet. Its operator must keep others away from it.
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

// Rule is what an operator decided. The zero value publishes nothing of NVIDIA's to
// destinations that are not on this machine and say nothing of themselves.
type Rule struct {
	// Redistribute is what may go everywhere; "" is [bundle.RedistributeNone].
	Redistribute bundle.Redistribution
	// Private marks destinations as private: each that begins with one of these names, up to
	// the end or a slash.
	Private []string
	// Addresses finds a host's addresses; nil asks the system's resolver.
	Addresses func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Destination is a destination, as a client without credentials sees it.
type Destination interface {
	// AnonymousAccess asks for one thing, or, where it has no name, in general.
	AnonymousAccess(ctx context.Context, what string) (registry.AnonymousAccess, error)
}

// Audience says who reads a destination.
type Audience struct {
	Public bool
	// Reason is half a sentence, such as "it is on this machine".
	Reason string
	// marked says that only the operator's mark makes it private.
	marked bool
}

// String is for people.
func (a Audience) String() string {
	if a.Public {
		return "public: " + a.Reason
	}
	return "private: " + a.Reason
}

// Audience finds out for whom the destination of this name is. A folder, what is on this
// machine, and a server that says so are private; so is what the operator marked, unless
// a client without credentials reads it over the internet. All else is public.
func (r Rule) Audience(ctx context.Context, name string, p Destination) (Audience, error) {
	seen, err := p.AnonymousAccess(ctx, "")
	if err != nil {
		return Audience{}, fmt.Errorf("read %s without credentials: %w", name, err)
	}
	switch {
	case seen.Host == "":
		return Audience{Reason: "it is a folder"}, nil
	case seen.Visibility == registry.AudiencePublic:
		return Audience{Public: true, Reason: "the server says so"}, nil
	case seen.Visibility == registry.AudiencePrivate:
		return Audience{Reason: "the server says so"}, nil
	}
	near, here := r.where(ctx, seen.Host)
	switch {
	case here:
		return Audience{Reason: "it is on this machine"}, nil
	case !r.marks(name) && seen.Reads:
		return Audience{Public: true, Reason: "it can be read without credentials"}, nil
	case !r.marks(name):
		return Audience{Public: true, Reason: "it is not marked private"}, nil
	case seen.Reads && !near:
		return Audience{Public: true, Reason: "it can be read without credentials, so --private is wrong"}, nil
	}
	return Audience{Reason: "--private says so", marked: true}, nil
}

// marks reports whether the operator marked a destination.
func (r Rule) marks(name string) bool {
	for _, p := range r.Private {
		if p = strings.TrimSuffix(p, "/"); p != "" && (name == p || strings.HasPrefix(name, p+"/")) {
			return true
		}
	}
	return false
}

// lookupTimeout bounds the look-up of a name.
const lookupTimeout = 10 * time.Second

// where finds out how far a host is: near is a network that the internet does not reach,
// here this machine. One whose name nobody knows, as behind a proxy, is far.
func (r Rule) where(ctx context.Context, hostport string) (near, here bool) {
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
	near, here = err == nil && len(all) > 0, err == nil && len(all) > 0
	shared := netip.MustParsePrefix("100.64.0.0/10") // RFC 6598
	for _, a := range all {
		a = a.Unmap()
		here = here && a.IsLoopback()
		near = near && (a.IsLoopback() || a.IsPrivate() || a.IsLinkLocalUnicast() || shared.Contains(a))
	}
	return near, here
}

// Check refuses, as [fault.PublishRefused], a destination to which an artifact with
// modules of this flavour may not go. It is asked before anything is made.
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

// Published examines what was published, under its name or digest: a destination whose
// only claim to be private is its mark must not hand it to everybody.
func (r Rule) Published(ctx context.Context, name string, p Destination, f target.Flavour, what string) error {
	need := bundle.LicenceOf(f).Redistribution
	if r.Redistribute.Covers(need) || !r.marks(name) {
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
	if near, _ := r.where(ctx, seen.Host); seen.Reads && !near {
		return fault.New(fault.PublishRefused,
			fmt.Sprintf("%s is in %s now, and can be read without credentials", what, name),
			"remove it, or revoke public read access there; then publish again")
	}
	return nil
}

func refuse(name string, f target.Flavour, who Audience, need bundle.Redistribution) error {
	what := "user space and firmware beside open modules are"
	if f != target.Open {
		what = "modules, user space and firmware are"
	}
	hint := fmt.Sprintf("if only you can read it, add --private %s", name)
	if who.Reason != "it is not marked private" {
		hint = "publish to a private destination"
		if strings.HasSuffix(who.Reason, "credentials, so --private is wrong") ||
			strings.HasSuffix(who.Reason, "without credentials") {
			hint = "revoke public read access to it, and add --private " + name
		}
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
		hint+fmt.Sprintf("; if you may pass on what NVIDIA's licence covers, add --redistribute %s", need),
	)
}
