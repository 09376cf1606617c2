package main

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/listed"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/policy"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/snapshot"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// newVerifier returns a verifier that trusts the signers in the flags or the policy. The returned function refreshes
// the signed list. It is nil if the policy demands no list.
func newVerifier(
	cmd *ucli.Command,
	p policy.Policy,
	node *noderoot.Root,
) (*trust.Verifier, func(context.Context) error, error) {
	rule, err := newListing(cmd, p, node)
	if err != nil {
		return nil, nil, err
	}
	if rule == nil {
		v, err := trust.NewVerifier(p.Policy)
		return v, nil, err
	}
	p.Listing = rule
	v, err := trust.NewVerifier(p.Policy)
	return v, rule.Refresh, err
}

// rereading is a verifier that reads the keys and the policy again at the beginning of each run, and while a driver is
// watched: a revoked key must not count until the program is started again.
type rereading struct {
	// read returns what [newVerifier] returns for the present files.
	read func() (*trust.Verifier, func(context.Context) error, error)

	mu      sync.Mutex
	last    *trust.Verifier
	refresh func(context.Context) error
}

// Reread reads the files. If that fails, the verifier keeps the last good keys and policy.
func (r *rereading) Reread() error {
	v, refresh, err := r.read()
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last, r.refresh = v, refresh
	return nil
}

func (r *rereading) present() (*trust.Verifier, func(context.Context) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last, r.refresh
}

// Refresh refreshes the signed list, if the policy demands one.
func (r *rereading) Refresh(ctx context.Context) error {
	if _, refresh := r.present(); refresh != nil {
		return refresh(ctx)
	}
	return nil
}

// Verify implements [agent.Verifier].
func (r *rereading) Verify(bundles [][]byte, e trust.Expect) (*trust.Verdict, error) {
	v, _ := r.present()
	return v.Verify(bundles, e)
}

// Statement implements [agent.Verifier].
func (r *rereading) Statement(bundle []byte) (*trust.Statement, error) {
	v, _ := r.present()
	return v.Statement(bundle)
}

// Wanted implements [agent.Verifier].
func (r *rereading) Wanted(k target.Kernel) []map[string]string {
	v, _ := r.present()
	return v.Wanted(k)
}

// newListing returns the rule for the signed list that a policy demands, or nil.
func newListing(cmd *ucli.Command, p policy.Policy, node *noderoot.Root) (*listed.Rule, error) {
	if p.Snapshot == nil {
		return nil, nil
	}
	state, err := node.Path(cmd.String("state-dir"))
	if err != nil {
		return nil, err
	}
	client, err := snapshot.New(snapshot.Config{
		From: p.Snapshot.From, Root: p.Root, State: filepath.Join(state, "snapshot.json"),
		ReadOnly: cmd.Bool("dry-run") || cmd.Name == "verify", UserAgent: "prebake-fetcher/" + version,
	})
	return &listed.Rule{
		Client: client, MaxAge: time.Duration(p.Snapshot.MaxAgeHours) * time.Hour,
		AllowUnlisted: p.Snapshot.AllowUnlisted, Optional: p.Snapshot.Optional,
	}, err
}

// trustPolicy reads the policy file, or else the trust flags. With a certificate identity, the default key file may be
// missing. A file of --public-key must exist.
func trustPolicy(cmd *ucli.Command) (policy.Policy, error) {
	if err := checkTrust(cmd); err != nil {
		return policy.Policy{}, err
	}
	if file := cmd.String("policy"); file != "" {
		return policy.Read(file)
	}
	p, err := flagPolicy(cmd)
	return policy.Policy{Policy: p}, err
}

// checkTrust refuses contradicting trust settings. It reads no file.
func checkTrust(cmd *ucli.Command) error {
	if cmd.String("policy") == "" {
		if (cmd.String("trusted-root") == "") != (identity(cmd) == trust.Identity{}) {
			return cli.About(fault.New(
				fault.Usage,
				"want both --trusted-root and a certificate identity, or neither",
				"give --trusted-root FILE with --certificate-identity NAME and --certificate-oidc-issuer URL",
			), "trusted-root", "certificate-identity", "certificate-identity-regexp", "certificate-oidc-issuer")
		}
		return nil
	}
	for _, name := range []string{"public-key", "load-test-policy", "trusted-root", "certificate-identity",
		"certificate-identity-regexp", "certificate-oidc-issuer"} {
		if cmd.IsSet(name) {
			return cli.About(fault.New(
				fault.Usage,
				"--policy and --"+name+" exclude each other",
				"put the setting into the policy file; to print the format of the file: fetcher policy schema",
			), name, "policy")
		}
	}
	return nil
}
