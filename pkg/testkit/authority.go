package testkit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/digitorus/timestamp"
	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	prototrust "github.com/sigstore/protobuf-specs/gen/pb-go/trustroot/v1"
	"github.com/sigstore/sigstore-go/pkg/fulcio/certificate"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/sign"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/prebake/prebake/pkg/trust"
)

// Authority is a private Sigstore deployment. A test can get certificates and time stamps for any time.
type Authority struct {
	// CA is the certificate with which the authority issues others. CAKey is its private key.
	CA    *x509.Certificate
	CAKey *ecdsa.PrivateKey
	// Lifetime is how long the certificates that the authority issues are valid.
	Lifetime time.Duration

	stampRoot, stamper *x509.Certificate
	stampKey           *ecdsa.PrivateKey
	issued             atomic.Int32
}

// NewAuthority returns an authority whose own certificates are valid from ten years ago until ten years from now.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{CAKey: NewKey(t).private, Lifetime: 10 * time.Minute, stampKey: NewKey(t).private}
	certifying := x509.Certificate{Subject: pkix.Name{CommonName: "sample authority"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	long := func(c x509.Certificate) *x509.Certificate {
		c.NotBefore, c.NotAfter = time.Now().AddDate(-10, 0, 0), time.Now().AddDate(10, 0, 0)
		return &c
	}
	a.CA = issue(t, long(certifying), nil, a.CAKey.Public(), a.CAKey)
	rootKey := NewKey(t).private
	a.stampRoot = issue(t, long(certifying), nil, rootKey.Public(), rootKey)
	// The extended key usage is "time stamping", and it is critical, as RFC 3161 requires.
	usage, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	if err != nil {
		t.Fatal(err)
	}
	a.stamper = issue(t, long(x509.Certificate{
		Subject: pkix.Name{CommonName: "sample time"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: usage}},
	}), a.stampRoot, a.stampKey.Public(), rootKey)
	return a
}

// issue signs a certificate. If parent is nil, the certificate is self-signed.
func issue(t testing.TB, c, parent *x509.Certificate, pub crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber = serial
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, by)
	if err != nil {
		t.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// Certificate returns a certificate that binds a key to an identity, valid from the given time on.
func (a *Authority) Certificate(t testing.TB, pub crypto.PublicKey, who trust.Identity,
	from time.Time) *x509.Certificate {
	t.Helper()
	issuer, err := asn1.MarshalWithParams(who.Issuer, "utf8")
	if err != nil {
		t.Fatal(err)
	}
	return issue(t, &x509.Certificate{
		NotBefore: from, NotAfter: from.Add(a.Lifetime), EmailAddresses: []string{who.Subject},
		ExtraExtensions: []pkix.Extension{{Id: certificate.OIDIssuerV2, Value: issuer}},
		KeyUsage:        x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}, a.CA, pub, a.CAKey)
}

// Root returns the trusted root of the deployment, in the format of trusted_root.json. It lists the given logs. The
// authority writes no entries to them.
func (a *Authority) Root(t testing.TB, certificateLogs, logs map[string]*root.TransparencyLog) []byte {
	t.Helper()
	from := a.CA.NotBefore
	r, err := root.NewTrustedRoot(root.TrustedRootMediaType01,
		[]root.CertificateAuthority{&root.FulcioCertificateAuthority{Root: a.CA, ValidityPeriodStart: from,
			URI: "https://ca.example.com"}}, certificateLogs,
		[]root.TimestampingAuthority{&root.SigstoreTimestampingAuthority{Root: a.stampRoot, Leaf: a.stamper,
			ValidityPeriodStart: from, URI: "https://time.example.com"}}, logs)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := r.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Timestamp returns an RFC 3161 time stamp for a SHA-256 digest.
func (a *Authority) Timestamp(t testing.TB, sum []byte, at time.Time) []byte {
	t.Helper()
	raw, err := (&timestamp.Timestamp{
		HashAlgorithm: crypto.SHA256, HashedMessage: sum, Time: at, Policy: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 2},
	}).CreateResponseWithOpts(a.stamper, a.stampKey, crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// ServeCertificates starts a server that issues certificates as Fulcio does, and returns its URL. The server runs until
// the test ends. It accepts every [Token] that is not expired, without checking the token's signature.
func (a *Authority) ServeCertificates(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		pub, who, err := readRequest(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a.issued.Add(1)
		made := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate(t, pub, who, time.Now()).Raw})
		_ = json.NewEncoder(w).Encode(
			map[string]any{"signedCertificateDetachedSct": map[string]any{
				"chain": map[string]any{"certificates": []string{string(made)}}}})
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// Issued returns how many certificates the server has issued.
func (a *Authority) Issued() int { return int(a.issued.Load()) }

type claims struct {
	Email    string `json:"email"`
	Verified bool   `json:"email_verified"`
	Issuer   string `json:"iss"`
	Expires  int64  `json:"exp"`
}

// Token returns an identity token without a valid signature.
func Token(t testing.TB, issuer, email string, expires time.Time) []byte {
	t.Helper()
	body, err := json.Marshal(claims{email, true, issuer, expires.Unix()})
	if err != nil {
		t.Fatal(err)
	}
	return []byte("e30." + base64.RawURLEncoding.EncodeToString(body) + ".e30")
}

// readRequest reads a request to Fulcio. The request asks for a certificate that binds a public key to the holder of an
// identity token. readRequest verifies the signature over the holder's mail address, which proves that the sender has
// the private key.
func readRequest(r *http.Request) (crypto.PublicKey, trust.Identity, error) {
	var in struct {
		PublicKeyRequest struct {
			PublicKey         struct{ Content string }
			ProofOfPossession []byte
		}
	}
	var who claims
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return nil, trust.Identity{}, err
	}
	_, token, _ := strings.Cut(r.Header.Get("Authorization"), ".")
	token, _, _ = strings.Cut(token, ".")
	body, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return nil, trust.Identity{}, err
	}
	if err := json.Unmarshal(body, &who); err != nil {
		return nil, trust.Identity{}, err
	}
	if who.Expires < time.Now().Unix() {
		return nil, trust.Identity{}, errors.New("token is expired")
	}
	pub, err := cryptoutils.UnmarshalPEMToPublicKey([]byte(in.PublicKeyRequest.PublicKey.Content))
	if err != nil {
		return nil, trust.Identity{}, err
	}
	v, err := signature.LoadDefaultVerifier(pub)
	if err != nil {
		return nil, trust.Identity{}, err
	}
	return pub, trust.Identity{Subject: who.Email, Issuer: who.Issuer},
		v.VerifySignature(bytes.NewReader(in.PublicKeyRequest.ProofOfPossession), strings.NewReader(who.Email))
}

// SigningConfig writes a Sigstore signing configuration, and returns its path. ca is the URL of a certificate
// authority, and stamps are the URLs of timestamp authorities.
func SigningConfig(t testing.TB, ca string, stamps ...string) string {
	t.Helper()
	service := func(url string) root.Service {
		return root.Service{URL: url, MajorAPIVersion: 1, ValidityPeriodStart: time.Now().AddDate(-1, 0, 0), Operator: url}
	}
	all := root.ServiceConfiguration{Selector: prototrust.ServiceSelector_ALL}
	var times []root.Service
	for _, url := range stamps {
		times = append(times, service(url))
	}
	cfg, err := root.NewSigningConfig(root.SigningConfigMediaType02, []root.Service{service(ca)}, nil, nil, all, times,
		all)
	if err != nil {
		t.Fatal(err)
	}
	text, err := cfg.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "signing_config.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// ServeTime starts a timestamp authority, and returns its URL. It runs until the test ends.
func (a *Authority) ServeTime(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
			return
		}
		asked, err := timestamp.ParseRequest(body)
		if err != nil || asked.HashAlgorithm != crypto.SHA256 {
			http.Error(w, "want a SHA-256", http.StatusBadRequest)
			return
		}
		_, _ = w.Write(a.Timestamp(t, asked.HashedMessage, time.Now()))
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// Sign returns a Sigstore bundle with a signature over an in-toto statement in JSON. The key is new, and its
// certificate is valid from the given time on. The bundle has this authority's time stamps of the given times.
func (a *Authority) Sign(t testing.TB, payload []byte, who trust.Identity, from time.Time, stamps ...time.Time) []byte {
	t.Helper()
	b, err := sign.Bundle(&sign.DSSEData{Data: payload, PayloadType: "application/vnd.in-toto+json"},
		keypair{k: NewKey(t)},
		sign.BundleOptions{CertificateProvider: certifier(func(pub crypto.PublicKey) []byte {
			return a.Certificate(t, pub,
				who, from).Raw
		})})
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.GetDsseEnvelope().GetSignatures()[0].GetSig())
	proof := b.GetVerificationMaterial()
	for _, at := range stamps {
		if proof.TimestampVerificationData == nil {
			proof.TimestampVerificationData = &protobundle.TimestampVerificationData{}
		}
		proof.TimestampVerificationData.Rfc3161Timestamps = append(proof.TimestampVerificationData.Rfc3161Timestamps,
			&protocommon.RFC3161SignedTimestamp{SignedTimestamp: a.Timestamp(t, sum[:], at)})
	}
	raw, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// certifier returns a certificate for a public key, for the library that makes Sigstore bundles.
type certifier func(crypto.PublicKey) []byte

func (c certifier) GetCertificate(_ context.Context, k sign.Keypair, _ *sign.CertificateProviderOptions) ([]byte,
	error) {
	return c(k.GetPublicKey()), nil
}
