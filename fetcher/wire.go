package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/bootcfg"
	"github.com/prebake/prebake/fetcher/internal/credentials"
	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/localbuild"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/policy"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// hostParts returns the parts that every command needs, and the function that closes them.
func hostParts(cmd *ucli.Command, cfg agent.Config, log *slog.Logger) (agent.Parts, func() error, error) {
	node, err := openNode(cmd)
	if err != nil {
		return agent.Parts{}, nil, err
	}
	probe := &gpucheck.Prober{
		Program: cmd.String("probe"), Node: node,
		Copy: filepath.Join(cfg.InstallDir, ".prebake", "probe"), ReadOnly: cmd.Name == "status",
	}
	return agent.Parts{
		NodeVerifier: func() (agent.Verifier, error) {
			state, err := node.Path(cmd.String("state-dir"))
			if err != nil {
				return nil, err
			}
			return nodeVerifier(cmd, state)
		},
		Node: node, Kernel: kmod.Linux{}, Nodes: devnode.Linux{}, Log: log, Now: time.Now,
		Boot:  bootcfg.Node{Root: node},
		Line:  &timeline.Run{Watch: cli.Progress(cmd.Root().ErrWriter)},
		Probe: probe, CUDA: probe,
	}, node.Close, nil
}

func openNode(cmd *ucli.Command) (*noderoot.Root, error) {
	node, err := noderoot.Open(cmd.String("host-root"))
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("open the folder of the host's root: %w", err),
			"set --host-root to the folder where the node's root is mounted",
		)
	}
	return node, nil
}

// newAgent makes an agent that installs drivers. If long is true, the agent logs; otherwise its log is discarded.
func newAgent(cmd *ucli.Command, long bool) (_ *agent.Agent, done func() error, err error) {
	cfg, err := readConfig(cmd)
	if err != nil {
		return nil, nil, err
	}
	log, err := logger(cmd, long)
	if err != nil {
		return nil, nil, err
	}
	parts, closeNode, err := hostParts(cmd, cfg, log)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, closeNode())
		}
	}()
	verifier := &rereading{read: func() (*trust.Verifier, func(context.Context) error, error) {
		return localVerifier(cmd, parts.Node)
	}}
	if err := verifier.Reread(); err != nil {
		return nil, nil, err
	}
	parts.Reread, parts.Refresh = verifier.Reread, verifier.Refresh
	if err := needProbe(cmd, cfg); err != nil {
		return nil, nil, err
	}
	if state, err := parts.Node.Path(cmd.String("state-dir")); err == nil && !cfg.DryRun {
		if err := localbuild.Sweep(state); err != nil {
			log.Warn("could not remove the builder's image, which a killed run left", "err", err)
		}
	}
	builder, err := newBuilder(cmd, parts.Node)
	if err != nil {
		return nil, nil, err
	}
	finder, err := newFinder(cmd, verifier, builder != nil)
	if err != nil {
		return nil, nil, err
	}
	parts.Finder, parts.Verifier, parts.Registries = finder, verifier, cmd.StringSlice("registry")
	parts.Open = func(ref string) (agent.Repository, error) { return openRepository(cmd, ref) }
	tell, err := newReporter(cmd, log)
	if err != nil {
		return nil, nil, err
	}
	if tell != nil {
		parts.Tried = tell.queue
		closeNode = func(closeNode func() error) func() error {
			return func() error { tell.close(); return closeNode() }
		}(closeNode)
	}
	if builder != nil {
		builder.Progress = func(line string) { parts.Line.Progress("build", "%s", strings.TrimSpace(line)) }
		parts.Local = builder
	}
	return agent.New(cfg, parts), closeNode, nil
}

func needProbe(cmd *ucli.Command, cfg agent.Config) error {
	if cfg.NoLoad || cfg.DryRun {
		return nil
	}
	if _, err := os.Stat(cmd.String("probe")); err != nil {
		return fault.Wrap(
			fault.Usage,
			fmt.Errorf("find the program nvmlprobe: %w", err),
			"give the path of the nvmlprobe program with --probe PATH, or load no module: --no-load",
		)
	}
	return nil
}

// nodeBuilds returns the part of the owner's policy for artifacts compiled on this node. The error is of kind
// Unverified if the policy file refuses them, or if there is no policy file and --builder is never.
func nodeBuilds(cmd *ucli.Command) (trust.Policy, error) {
	file := cmd.String("policy")
	if file == "" {
		if cmd.String("builder") == "never" {
			return trust.Policy{}, fault.New(
				fault.Unverified,
				"this node does not compile drivers (--builder never), and does not trust drivers that it compiled before",
				"publish the driver with \"builder build --to REF\", or allow this node to compile with --builder PROGRAM",
			)
		}
		return trust.Policy{}, nil
	}
	p, err := policy.Read(file)
	if err == nil && !p.NodeBuilds {
		err = fault.New(
			fault.Unverified,
			"the policy refuses drivers that the node itself compiled",
			"publish the driver with \"builder build --to REF\", or set nodeBuilds: true in the policy file",
		)
	}
	return trust.Policy{MinVersions: p.MinVersions, Revoked: p.Revoked}, err
}

func identity(cmd *ucli.Command) trust.Identity {
	return trust.Identity{
		Subject: cmd.String("certificate-identity"),
		Pattern: cmd.String("certificate-identity-regexp"),
		Issuer:  cmd.String("certificate-oidc-issuer"),
	}
}

// serverURL returns the URL of the Prebake server to ask, or nil.
func serverURL(cmd *ucli.Command) (*url.URL, error) {
	server := cmd.String("server")
	if server == "" {
		return nil, nil
	}
	u, err := url.Parse(server)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, cli.About(fault.New(
			fault.Usage,
			fmt.Sprintf("server %q: want a URL", server),
			"set the server's URL, as in --server http://127.0.0.1:8440",
		), "server")
	}
	return u, nil
}

// flagPolicy returns the policy that the trust flags describe.
func flagPolicy(cmd *ucli.Command) (policy trust.Policy, err error) {
	if policy.LoadTest, err = trust.ParseLoadTestPolicy(cmd.String("load-test-policy")); err != nil {
		return policy, fault.Wrap(fault.Usage, err, "set --load-test-policy to any or to tested")
	}
	file := cmd.String("trusted-root")
	if file != "" {
		if policy.Root, err = trust.ReadRoot(file); err != nil {
			return policy, err
		}
		policy.Identities = []trust.Identity{identity(cmd)}
	}
	pem, err := os.ReadFile(cmd.String("public-key"))
	switch {
	case err == nil:
		if policy.Keys, err = trust.ParsePublicKeys(pem); err != nil {
			return policy, err
		}
	case file == "" || cmd.IsSet("public-key") || !errors.Is(err, fs.ErrNotExist):
		return policy, fault.Wrap(
			fault.Usage,
			fmt.Errorf("read trusted keys: %w", err),
			"without a trusted key or identity, no driver is installed; give the publisher's public key with --public-key "+
				"FILE, or for keyless signing --trusted-root FILE, --certificate-identity NAME and --certificate-oidc-issuer URL",
		)
	}
	return policy, nil
}

// nodeVerifier returns a verifier that trusts this node's own key. It demands no load test, because the node itself
// will load the modules next.
func nodeVerifier(cmd *ucli.Command, stateDir string) (agent.Verifier, error) {
	p, err := nodeBuilds(cmd)
	if err != nil {
		return nil, err
	}
	pem, err := localbuild.PublicKey(stateDir)
	if err != nil {
		return nil, err
	}
	if p.Keys, err = trust.ParsePublicKeys(pem); err != nil {
		return nil, err
	}
	v, err := trust.NewVerifier(p)
	if err != nil {
		return nil, err // a nil *trust.Verifier in an interface would not equal nil
	}
	return v, nil
}

func openRepository(cmd *ucli.Command, ref string) (*registry.Repository, error) {
	o := registry.Options{
		UserAgent: "prebake-fetcher/" + version,
		RetryFor:  cmd.Duration("wait-build"),
		Keychain:  credentials.Keychain(),
	}
	// The registry of a server on plain HTTP uses plain HTTP, too.
	if u, err := url.Parse(cmd.String("server")); err == nil && u.Scheme == "http" && strings.HasPrefix(ref, u.Host+"/") {
		o.Plain = true
	}
	return registry.Open(ref, o)
}

// newBuilder returns nil if this node must not compile. It also returns nil if --builder is not set and the folder of
// fetcher has no program named builder.
func newBuilder(cmd *ucli.Command, node *noderoot.Root) (*localbuild.Builder, error) {
	program := cmd.String("builder")
	if program == "never" {
		return nil, nil
	}
	if _, err := nodeBuilds(cmd); err != nil {
		if program == "" && fault.Is(err, fault.Unverified) {
			return nil, nil
		}
		return nil, err
	}
	if program == "" {
		program = programBeside("builder")
		if _, err := os.Stat(program); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
	}
	var image *localbuild.Image
	if ref, digest, ok := strings.Cut(program, "@"); ok && strings.HasPrefix(digest, digestPrefix) {
		repo, err := openRepository(cmd, ref)
		if err != nil {
			return nil, err
		}
		image, program = &localbuild.Image{Repository: repo, Digest: digest}, ""
	} else {
		var err error
		if program, err = exec.LookPath(program); err != nil {
			return nil, fault.Wrap(fault.Usage, fmt.Errorf("find builder: %w", err),
				"give the builder program (--builder PATH) or its image (--builder HOST/NAME@sha256:DIGEST), or turn "+
					"compiling off: --builder never")
		}
	}
	state, err := node.Path(cmd.String("state-dir"))
	if err != nil {
		return nil, fmt.Errorf("find state folder: %w", err)
	}
	cache := cmd.String("cache")
	if cache == "" {
		cache = filepath.Join(state, "cache")
	}
	return &localbuild.Builder{
		Program: program, Image: image, Retry: cmd.Bool("retry"), StateDir: state, CacheDir: cache,
		KernelMirror: cmd.String("kernel-mirror"), DriverMirror: cmd.String("driver-mirror"),
	}, nil
}

// pinnedNowhere returns the error for a --driver that is a digest, if no --registry names the artifact's repository.
func pinnedNowhere() error {
	return cli.About(fault.New(
		fault.Usage,
		"--driver with a digest needs the artifact's repository",
		"set the artifact's repository: --registry HOST/NAME",
	), "driver")
}

// newFinder returns a finder that asks the server first and then the registries. Without both, the node must compile
// drivers itself, or the result is an error. The verifier is for the lists of supported GPUs; nil means that no list is
// read.
func newFinder(cmd *ucli.Command, v agent.Verifier, compiles bool) (resolve.Finder, error) {
	registries := cmd.StringSlice("registry")
	var gpus resolve.Lister
	if v != nil {
		open := func(ref string) (resolve.Attachments, error) { return openRepository(cmd, ref) }
		gpus = resolve.Signed(v, open, registries...)
	}
	pinned := strings.HasPrefix(cmd.String("driver"), digestPrefix)
	if pinned && len(registries) == 0 {
		return nil, pinnedNowhere()
	}
	var chain resolve.Chain
	server, err := serverURL(cmd)
	if err != nil {
		return nil, err
	}
	if server != nil && (!pinned || cmd.Bool("driver-label")) {
		client := api.NewClient(cmd.String("server"), "", nil)
		s := resolve.Server{Client: client, GPUs: gpus}
		if file := cmd.String("token-file"); file != "" && !cmd.Bool("dry-run") && cmd.Name != "resolve" {
			s.Request = client.WithTokenFile(file).RequestBuild // reads the file at each call, as kubelet renews the token
		}
		chain = append(chain, s)
	}
	for _, ref := range registries {
		if _, err := openRepository(cmd, ref); err != nil {
			return nil, err
		}
		chain = append(
			chain,
			registryFinder(ref, func() (*registry.Repository, error) { return openRepository(cmd, ref) }, gpus),
		)
	}
	switch {
	case len(chain) > 0:
		return chain, nil
	case compiles:
		return resolve.NoSource{}, nil
	}
	return nil, fault.New(
		fault.Usage,
		"no source for a driver",
		"set a server (--server URL), a registry (--registry REF), or a builder (--builder PATH)",
	)
}

// registryFinder returns a finder that asks one repository. It opens the repository again for each question, because
// credentials expire.
func registryFinder(ref string, open func() (*registry.Repository, error), gpus resolve.Lister) resolve.Registry {
	return resolve.Registry{
		Ref: ref, GPUs: gpus,
		Tags: func(ctx context.Context) ([]string, error) {
			repo, err := open()
			if err != nil {
				return nil, err
			}
			tags, err := repo.Tags(ctx)
			return tags, notRegistry(err)
		},
		Resolve: func(ctx context.Context, tag string) (string, error) {
			repo, err := open()
			if err != nil {
				return "", err
			}
			return artifactOf(ctx, repo, tag)
		},
		Driver: func(ctx context.Context, digest string) (target.Driver, error) {
			repo, err := open()
			if err != nil {
				return target.Driver{}, err
			}
			raw, err := repo.Manifest(ctx, digest)
			if err != nil {
				return target.Driver{}, notRegistry(err)
			}
			return bundle.DriverOf(raw)
		},
	}
}

// artifactOf returns the digest of the artifact with a tag. If the registry reports a media type that no artifact has,
// artifactOf also reads the manifest, because some registries report a wrong type.
func artifactOf(ctx context.Context, repo *registry.Repository, tag string) (string, error) {
	d, err := repo.Resolve(ctx, tag)
	if err != nil {
		return "", notRegistry(err)
	}
	if d.MediaType == types.OCIManifestSchema1 {
		return d.Digest.String(), nil
	}
	raw, err := repo.Manifest(ctx, d.Digest.String())
	if err == nil {
		_, err = bundle.DriverOf(raw)
	}
	if err != nil {
		return "", notRegistry(fmt.Errorf("tag %s in %s, of media type %.80q, is not an artifact: %w", tag, repo.Name(),
			d.MediaType, err))
	}
	return d.Digest.String(), nil
}

// notRegistry makes an error of kind Unverified a passing one, so that the next source is asked. Such an error means
// that something else than the registry responded, such as the login page of a network or a proxy.
func notRegistry(err error) error {
	if !fault.Is(err, fault.Unverified) {
		return err
	}
	hint := "check that --registry names a repository with drivers, and that no proxy or login page answers in its place"
	if errors.Is(err, registry.ErrLink) {
		hint = fault.Hint(err)
	}
	return resolve.OtherService(err, hint)
}
