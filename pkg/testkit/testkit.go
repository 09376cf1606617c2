// Package testkit provides small real components for tests: a registry in this process, a key pair, and a signed sample
// artifact. Only test files import it.
package testkit

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	"github.com/sigstore/sigstore-go/pkg/sign"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/trust"
)

// Registry runs a registry until the test ends, with or without the referrers API. It returns the registry's host:port.
func Registry(t testing.TB, referrers bool) string {
	t.Helper()
	s := httptest.NewServer(ggcr.New(ggcr.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)),
		ggcr.WithReferrersSupport(referrers)))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// Key is a new ECDSA P-256 key pair.
type Key struct{ private *ecdsa.PrivateKey }

// NewKey returns a new key pair.
func NewKey(t testing.TB) *Key {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &Key{private}
}

// Private returns the private key.
func (k *Key) Private() *ecdsa.PrivateKey { return k.private }

// Public returns the public key.
func (k *Key) Public(t testing.TB) trust.PublicKey {
	t.Helper()
	pub, err := trust.NewPublicKey(k.private.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// PEM returns the public key in PEM, as a node's configuration contains it.
func (k *Key) PEM(t testing.TB) []byte {
	t.Helper()
	text, err := cryptoutils.MarshalPublicKeyToPEM(k.private.Public())
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// Verifier returns a verifier that trusts this key only.
func (k *Key) Verifier(t testing.TB) *trust.Verifier {
	t.Helper()
	v, err := trust.NewVerifier(trust.Policy{Keys: []trust.PublicKey{k.Public(t)}})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// Sign returns a Sigstore bundle with a signature over an in-toto statement in JSON.
func (k *Key) Sign(t testing.TB, payload []byte) []byte {
	t.Helper()
	b, err := sign.Bundle(&sign.DSSEData{Data: payload, PayloadType: "application/vnd.in-toto+json"},
		keypair{k, k.Public(t).Hint()}, sign.BundleOptions{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Statement returns a signed statement about a manifest digest.
func (k *Key) Statement(t testing.TB, digest, predicateType string, predicate any) []byte {
	t.Helper()
	return k.Sign(t, Payload(t, digest, predicateType, predicate))
}

// Payload returns an unsigned statement about a manifest digest.
func Payload(t testing.TB, digest, predicateType string, predicate any) []byte {
	t.Helper()
	payload, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1",
		"subject": []any{map[string]any{"name": "sample",
			"digest": map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}},
		"predicateType": predicateType,
		"predicate":     predicate,
	})
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

// Provenance returns a signed provenance statement.
func (k *Key) Provenance(t testing.TB, digest string, p trust.Parameters) []byte {
	t.Helper()
	return k.Statement(t, digest, trust.PredicateProvenance, ProvenancePredicate(p))
}

// ProvenancePredicate returns the predicate of a valid provenance. A test may change it before it signs it.
func ProvenancePredicate(p trust.Parameters) map[string]any {
	return map[string]any{
		"buildDefinition": map[string]any{
			"buildType":          trust.BuildType,
			"externalParameters": p,
			"resolvedDependencies": []any{
				map[string]any{"name": "kernel-headers.tgz", "uri": "https://example.com/kernel-headers.tgz",
					"digest": map[string]string{"sha256": strings.Repeat("5", 64)}},
			},
		},
		"runDetails": map[string]any{"builder": map[string]any{"id": "https://example.com/builder"},
			"metadata": map[string]any{"invocationId": "run-1"}},
	}
}

// KernelMatch returns a signed kernel match statement.
func (k *Key) KernelMatch(t testing.TB, digest string, m trust.KernelMatch) []byte {
	t.Helper()
	return k.Statement(t, digest, trust.PredicateKernelMatch, m)
}

// keypair lets the library that makes Sigstore bundles sign with a Key.
type keypair struct {
	k    *Key
	hint string
}

func (p keypair) GetHashAlgorithm() protocommon.HashAlgorithm {
	return protocommon.HashAlgorithm_SHA2_256
}

func (p keypair) GetSigningAlgorithm() protocommon.PublicKeyDetails {
	return protocommon.PublicKeyDetails_PKIX_ECDSA_P256_SHA_256
}

func (p keypair) GetHint() []byte                { return []byte(p.hint) }
func (p keypair) GetKeyAlgorithm() string        { return "ECDSA" }
func (p keypair) GetPublicKey() crypto.PublicKey { return p.k.private.Public() }

func (p keypair) GetPublicKeyPem() (string, error) {
	text, err := cryptoutils.MarshalPublicKeyToPEM(p.k.private.Public())
	return string(text), err
}

func (p keypair) SignData(_ context.Context, data []byte) (sig, digest []byte, err error) {
	sum := sha256.Sum256(data)
	sig, err = ecdsa.SignASN1(rand.Reader, p.k.private, sum[:])
	return sig, sum[:], err
}

// Sample is a small artifact with its statements.
type Sample struct {
	Image    v1.Image
	Digest   string
	Identity bundle.Identity
	// Kernel is the COS build about which the statements are.
	Kernel target.Kernel
	Layers []bundle.Layer
	// Bundles are the Sigstore bundles with the signed statements.
	Bundles [][]byte
}

// SampleKernel returns the COS build of [NewSample], with the given last number of its BUILD_ID.
func SampleKernel(patch string) target.Kernel {
	return target.Kernel{
		BuildID: "17800.0." + patch, Board: "lakitu", Milestone: 109, Arch: target.AMD64,
		Release: "6.1.0-" + patch + "-cloud-amd64", Version: "#1 SMP PREEMPT_DYNAMIC Debian " + patch,
	}
}

// NewSample makes an artifact for a kernel and a driver, with statements that key signs. Its module files are not real
// modules. Artifacts with different salts have different digests and the same [bundle.Identity].
func NewSample(t testing.TB, key *Key, k target.Kernel, d target.Driver, salt string) Sample {
	t.Helper()
	return NewSampleOf(t, key, k, d, map[string]string{
		"drivers/nvidia.ko": "\x7fELF nvidia " + k.Release + salt, "drivers/nvidia-uvm.ko": "\x7fELF uvm " + k.Release,
	})
}

// Vermagic returns the vermagic string that a sample's modules must have, as package modinfo reads it.
func Vermagic(k target.Kernel) string { return k.Release + " SMP preempt mod_unload modversions" }

// NewSampleOf is like [NewSample], with the given modules. The map has their contents by path.
func NewSampleOf(t testing.TB, key *Key, k target.Kernel, d target.Driver, modules map[string]string) Sample {
	t.Helper()
	fp := sha256.Sum256([]byte("fingerprint of " + k.Release))
	s := Sample{Kernel: k, Identity: bundle.Identity{
		Fingerprint: target.Fingerprint("sha256:" + hex.EncodeToString(fp[:])),
		Arch:        k.Arch, Release: k.Release, Vermagic: Vermagic(k), Driver: d,
	}}
	files := map[bundle.LayerKind]map[string]string{
		bundle.LayerModules: modules,
		bundle.LayerUserspace: {"bin/nvidia-smi": "#! smi " + d.Version,
			"lib64/libnvidia-ml.so." + d.Version: "\x7fELF nvml " + d.Version, "share/LICENSE": "text"},
		bundle.LayerFirmware: {"firmware/nvidia/" + d.Version + "/gsp_tu10x.bin": "gsp " + d.Version},
	}
	for _, kind := range bundle.LayerKinds() {
		dir := t.TempDir()
		for name, content := range files[kind] {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			mode := os.FileMode(0o644)
			if strings.HasPrefix(name, "bin/") {
				mode = 0o755
			}
			if err := os.WriteFile(path, []byte(content), mode); err != nil {
				t.Fatal(err)
			}
		}
		if kind == bundle.LayerUserspace {
			if err := os.Symlink("libnvidia-ml.so."+d.Version, filepath.Join(dir, "lib64/libnvidia-ml.so.1")); err != nil {
				t.Fatal(err)
			}
		}
		l, err := bundle.PackLayer(t.Context(), dir, kind, filepath.Join(t.TempDir(), string(kind)))
		if err != nil {
			t.Fatal(err)
		}
		s.Layers = append(s.Layers, l)
	}
	var err error
	if s.Image, err = bundle.Image(s.Identity, s.Layers); err != nil {
		t.Fatal(err)
	}
	digest, err := s.Image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	s.Digest = digest.String()
	s.Bundles = [][]byte{
		key.Provenance(t, s.Digest, trust.Parameters{Kernel: k, Fingerprint: s.Identity.Fingerprint, Driver: d}),
		key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: k, Fingerprint: s.Identity.Fingerprint}),
	}
	return s
}

// Expect returns what a node with the sample's kernel expects of the sample.
func (s Sample) Expect() trust.Expect {
	return trust.Expect{Digest: s.Digest, Kernel: s.Kernel, Driver: s.Identity.Driver, Identity: s.Identity}
}

// Publish pushes the sample to a repository, with its statements and tags.
func (s Sample) Publish(t testing.TB, repo *registry.Repository) {
	t.Helper()
	d, err := repo.Push(t.Context(), s.Image)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range s.Bundles {
		if _, err := repo.Attach(t.Context(), d, trust.ArtifactTypeBundle, b, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, tag := range []string{bundle.Tag(s.Identity), bundle.KernelTag(s.Kernel, s.Identity.Driver)} {
		if err := repo.Tag(t.Context(), d, tag); err != nil {
			t.Fatal(err)
		}
	}
}

// AttachJunk attaches useless statements to an artifact, as many as a client reads of one kind. Their labels say that
// they are of the given type, and that they are newer than all others.
func AttachJunk(t testing.TB, repo *registry.Repository, digest, predicateType string) {
	t.Helper()
	subject, err := repo.Resolve(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	labels := trust.Labels(&trust.Statement{PredicateType: predicateType})
	labels[trust.LabelCreated] = "2099-01-01T00:00:00Z"
	for i := range registry.MaxAttachments {
		if _, err := repo.Attach(t.Context(), subject, trust.ArtifactTypeBundle, fmt.Appendf(nil, "junk %d", i),
			labels); err != nil {
			t.Fatal(err)
		}
	}
}
