package sign

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	prototrust "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"github.com/sigstore/sigstore-go/pkg/fulcio/certificate"
	"github.com/sigstore/sigstore-go/pkg/root"
	sgsign "github.com/sigstore/sigstore-go/pkg/sign"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/trust"
)

// PrefixKeyless begins a reference to a Sigstore signing configuration. The configuration lists the certificate
// authority, and the timestamp authorities and logs that prove the time of a signature.
const PrefixKeyless = "keyless:"

// WithIdentity is the option that keyless signing needs. The callback returns an OpenID Connect token, which tells the
// certificate authority who signs. LoadSigner and Bundle call it for each new certificate. Signatures and certificates
// must verify against the trusted root.
func WithIdentity(root *trust.Root, token func() ([]byte, error)) Option {
	return func(l *loading) { l.root, l.token = root, token }
}

// margin is how long a certificate must still be valid when a signature is made. So the time stamp of the signature is
// within the validity of the certificate.
const margin = time.Minute

const (
	maxSigningConfig = 1 << 20
	maxRetries       = 3 // how often sigstore-go repeats a request whose response has an HTTP 5xx status
)

// keyless signs with short-lived keys. It uses each key until its certificate is about to expire (see margin).
type keyless struct {
	ca           *sgsign.Fulcio
	timestampers []*sgsign.TimestampAuthority
	logs         []sgsign.Transparency
	token        func() ([]byte, error)
	policy       trust.Policy // trusts the subject of the first certificate, a person or a service

	mu      sync.Mutex
	keypair sgsign.Keypair
	leaf    *x509.Certificate
	until   time.Time
}

func fromIdentity(ctx context.Context, path string, l loading) (*Signer, error) {
	if l.root == nil || l.token == nil {
		return nil, fault.New(fault.Usage, "keyless signing needs a trusted root and an identity token",
			"add --trusted-root FILE and --identity-token FILE")
	}
	text, err := readFile(path, maxSigningConfig, "write a signing configuration with: cosign signing-config create")
	if err != nil {
		return nil, err
	}
	k := &keyless{token: l.token}
	if err := k.services(text, time.Now()); err != nil {
		return nil, fault.Wrap(fault.Usage, fmt.Errorf("read the signing configuration: %w", err),
			"give a Sigstore signing_config.json that has a certificate authority, and also a timestamp authority or log; "+
				"write one with: cosign signing-config create")
	}
	_, leaf, err := k.certifiedKey(ctx)
	if err != nil {
		return nil, err
	}
	if err := l.root.Certified(leaf); err != nil {
		return nil, fault.Wrap(fault.Usage, err,
			"give --trusted-root the trusted_root.json of the Sigstore deployment in the signing configuration")
	}
	who, err := certificate.SummarizeCertificate(leaf)
	if err != nil {
		return nil, fmt.Errorf("read the signer's name from the new certificate: %w", err)
	}
	k.policy = trust.Policy{Root: l.root,
		Identities: []trust.Identity{{Subject: who.SubjectAlternativeName, Issuer: who.Issuer}}}
	return &Signer{keyless: k}, nil
}

// services parses a signing configuration and selects the services in it that are valid at the time now.
func (k *keyless) services(text []byte, now time.Time) error {
	raw, err := root.NewSigningConfigProtobuf(text)
	if err != nil {
		return err
	}
	cfg, err := root.NewSigningConfigFromProtobuf(raw)
	if err != nil {
		return err
	}
	ca, err := root.SelectService(cfg.FulcioCertificateAuthorityURLs(), sgsign.FulcioAPIVersions, now)
	if err != nil {
		return fmt.Errorf("choose a certificate authority: %w", err)
	}
	k.ca = sgsign.NewFulcio(&sgsign.FulcioOptions{BaseURL: ca.URL, Retries: maxRetries})
	stamps, err := selectServices("timestamp authority", raw.GetTsaConfig(), cfg.TimestampAuthorityURLs(),
		sgsign.TimestampAuthorityAPIVersions, now)
	if err != nil {
		return err
	}
	for _, s := range stamps {
		k.timestampers = append(k.timestampers,
			sgsign.NewTimestampAuthority(&sgsign.TimestampAuthorityOptions{URL: s.URL, Retries: maxRetries}))
	}
	logs, err := selectServices("log", raw.GetRekorTlogConfig(), cfg.RekorLogURLs(), sgsign.RekorAPIVersions, now)
	if err != nil {
		return err
	}
	for _, s := range logs {
		k.logs = append(k.logs, sgsign.NewRekor(&sgsign.RekorOptions{BaseURL: s.URL, Retries: maxRetries,
			Version: s.MajorAPIVersion}))
	}
	if len(k.timestampers)+len(k.logs) == 0 {
		return errors.New("the signing configuration has no timestamp authority and no log; want at least one of them")
	}
	return nil
}

// selectServices selects the required number of services of one kind. If the configuration has none, it returns nil.
func selectServices(kind string, want *prototrust.ServiceConfiguration, all []root.Service, versions []uint32,
	now time.Time) ([]root.Service, error) {
	if len(all) == 0 {
		return nil, nil
	}
	some, err := root.SelectServices(all, root.ServiceConfiguration{Selector: want.GetSelector(), Count: want.GetCount()},
		versions, now)
	if err != nil {
		return nil, fmt.Errorf("choose a %s: %w", kind, err)
	}
	return some, nil
}

// certifiedKey returns a key and its certificate. If the certificate expires within margin, both are made anew.
func (k *keyless) certifiedKey(ctx context.Context) (sgsign.Keypair, *x509.Certificate, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Now().Before(k.until) {
		return k.keypair, k.leaf, nil
	}
	token, err := k.token()
	if err != nil {
		return nil, nil, err
	}
	fresh, err := sgsign.NewEphemeralKeypair(nil)
	if err != nil {
		return nil, nil, err
	}
	asked := time.Now()
	der, err := k.ca.GetCertificate(ctx, fresh, &sgsign.CertificateProviderOptions{IDToken: string(token)})
	if err != nil {
		return nil, nil, explainService(ctx, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("parse the new certificate of the signing key: %w", err)
	}
	// The authority's clock may differ from the local one. So add the length of the validity to the local time.
	k.keypair, k.leaf, k.until = fresh, leaf, asked.Add(leaf.NotAfter.Sub(leaf.NotBefore)-margin)
	return fresh, leaf, nil
}

// bundleOptions returns the key for the next signature, and options with its certificate and the services that prove
// the time.
func (k *keyless) bundleOptions(ctx context.Context) (sgsign.Keypair, sgsign.BundleOptions, error) {
	key, leaf, err := k.certifiedKey(ctx)
	return key, sgsign.BundleOptions{Context: ctx, CertificateProvider: issuedCertificate{leaf},
		TimestampAuthorities: k.timestampers, TransparencyLogs: k.logs}, err
}

// issuedCertificate passes an existing certificate to the bundle library. Otherwise the library would request a new
// one.
type issuedCertificate struct{ leaf *x509.Certificate }

func (i issuedCertificate) GetCertificate(context.Context, sgsign.Keypair, *sgsign.CertificateProviderOptions) ([]byte,
	error) {
	return i.leaf.Raw, nil
}

// explainService adds a kind and a hint to an error of a service: [fault.Usage] for a wrong token or setting,
// [fault.Transient] otherwise. It compares texts, because the libraries have no error types.
func explainService(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	const hintToken = "give a fresh token with --identity-token FILE or in SIGSTORE_ID_TOKEN; its audience must be " +
		"the name that the certificate authority wants, usually sigstore"
	for _, known := range []struct{ text, hint string }{
		{"Fulcio returned 4", hintToken},
		{"identity token", hintToken},
		{"illegal base64", hintToken},
		{"invalid character", hintToken},
		{"in claims", hintToken},
		{"not verified by identity provider", hintToken},
		{"authority returned 4", "check the timestamp authority's URL in the signing configuration"},
	} {
		if strings.Contains(err.Error(), known.text) {
			return fault.Wrap(fault.Usage, err, known.hint)
		}
	}
	return fault.Wrap(fault.Transient, err, "check that the services in the signing configuration can be reached")
}

// readFile reads a file of at most limit bytes. If the file cannot be opened, the error has the given hint.
func readFile(path string, limit int64, hint string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, hint)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > limit {
		return nil, fault.Errorf(fault.Usage, "the file has more than %d bytes", limit)
	}
	return text, nil
}
