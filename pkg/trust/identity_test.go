package trust_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

func someone() trust.Identity {
	return trust.Identity{Subject: "farm@example.com", Issuer: "https://login.example.com"}
}

// longAgo is the time at which an expired certificate was issued.
func longAgo() time.Time { return time.Now().AddDate(-1, 0, 0) }

func parseRoot(t testing.TB, text []byte) *trust.Root {
	t.Helper()
	r, err := trust.ParseRoot(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func verifier(t testing.TB, p trust.Policy) *trust.Verifier {
	t.Helper()
	v, err := trust.NewVerifier(p)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// payloads returns the two statements that every artifact needs, without signatures.
func payloads(t testing.TB, s testkit.Sample) (provenance, match []byte) {
	t.Helper()
	return testkit.Payload(t, s.Digest, trust.PredicateProvenance,
			testkit.ProvenancePredicate(trust.Parameters{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint,
				Driver: s.Identity.Driver})),
		testkit.Payload(t, s.Digest, trust.PredicateKernelMatch,
			trust.KernelMatch{Kernel: s.Kernel, Fingerprint: s.Identity.Fingerprint})
}

func TestIdentities(t *testing.T) {
	t.Parallel()
	farm, issued := testkit.NewAuthority(t), longAgo()
	inTime := issued.Add(time.Minute)
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	provenance, match := payloads(t, s)
	both := [][]byte{farm.Sign(t, provenance, someone(), issued, inTime), farm.Sign(t, match, someone(), issued, inTime)}
	mixed := [][]byte{both[0], s.Bundles[1]}
	ofFarm := parseRoot(t, farm.Root(t, nil, nil))
	whole := trust.Identity{Pattern: `[a-z]+@example\.com`, Issuer: someone().Issuer}
	rows := []struct {
		name    string
		policy  trust.Policy
		bundles [][]byte
		by      string
	}{
		{"expired, but stamped in time", trust.Policy{Root: ofFarm, Identities: []trust.Identity{someone()}}, both,
			someone().String()},
		{"one of several", trust.Policy{Root: ofFarm, Identities: []trust.Identity{{Subject: "x", Issuer: "y"}, someone()}},
			both, someone().String()},
		{"pattern", trust.Policy{Root: ofFarm, Identities: []trust.Identity{whole}}, both, someone().String()},
		{"mixed", trust.Policy{Keys: []trust.PublicKey{key.Public(t)}, Root: ofFarm, Identities: []trust.Identity{someone()}},
			mixed, someone().String() + ", the kernel match by " + key.Public(t).ID()},
		{"a key among them", trust.Policy{Keys: []trust.PublicKey{key.Public(t)}, Root: ofFarm,
			Identities: []trust.Identity{{Subject: "x", Issuer: "y"}}}, s.Bundles, key.Public(t).ID()},
	}
	for _, row := range rows {
		got, err := verifier(t, row.policy).Verify(row.bundles, s.Expect())
		if err != nil || got.SignedBy() != row.by {
			t.Errorf("%s: Verify = %+v, %v; want it signed by %s", row.name, got, err, row.by)
		}
	}
}

func TestIdentitiesRefused(t *testing.T) {
	t.Parallel()
	farm, stranger, issued := testkit.NewAuthority(t), testkit.NewAuthority(t), longAgo()
	inTime, late := issued.Add(time.Minute), issued.Add(11*time.Minute)
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	provenance, _ := payloads(t, s)
	signed := farm.Sign(t, provenance, someone(), issued, inTime)
	plain := farm.Root(t, nil, nil)
	log := someLog(t)
	trusting := func(root []byte, who ...trust.Identity) *trust.Verifier {
		return verifier(t, trust.Policy{Root: parseRoot(t, root), Identities: who})
	}
	// The certificate and signature are the farm's. The timestamp is from the bundle of another signer.
	stolen := func() []byte {
		mine, theirs := map[string]any{}, map[string]any{}
		for raw, into := range map[string]*map[string]any{string(signed): &mine,
			string(stranger.Sign(t, provenance, someone(), issued, inTime)): &theirs} {
			if err := json.Unmarshal([]byte(raw), into); err != nil {
				t.Fatal(err)
			}
		}
		const stamps = "timestampVerificationData"
		mine["verificationMaterial"].(map[string]any)[stamps] = theirs["verificationMaterial"].(map[string]any)[stamps]
		raw, err := json.Marshal(mine)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	rows := []struct {
		name   string
		v      *trust.Verifier
		bundle []byte
		is     error
		text   string
		hint   string
	}{
		{"another name", trusting(plain, trust.Identity{Subject: "other@example.com", Issuer: someone().Issuer}), signed,
			trust.ErrUnknownIdentity,
			`"farm@example.com (https://login.example.com)"; trusted signers are other@example.com (https://login.example.com)`,
			"the subject and the issuer"},
		{"another issuer", trusting(plain, trust.Identity{Subject: someone().Subject, Issuer: "https://login.example.org"}),
			signed, trust.ErrUnknownIdentity, "login.example.org", "the subject and the issuer"},
		{"a pattern for a part of the name",
			trusting(plain, trust.Identity{Pattern: "farm@example", Issuer: someone().Issuer}), signed, trust.ErrUnknownIdentity,
			"/farm@example/", "the subject and the issuer"},
		{"an alternative for a part of the name",
			trusting(plain, trust.Identity{Pattern: "x|farm", Issuer: someone().Issuer}), signed, trust.ErrUnknownIdentity,
			"/x|farm/", "the subject and the issuer"},
		{"another root", trusting(stranger.Root(t, nil, nil), someone()), signed, trust.ErrOtherRoot, "sample authority",
			"trusted root"},
		{"no stamp", trusting(plain, someone()), farm.Sign(t, provenance, someone(), issued), trust.ErrNoTime, "threshold",
			"timestamp authority"},
		{"no stamp, and not expired", trusting(plain, someone()), farm.Sign(t, provenance, someone(), time.Now()),
			trust.ErrNoTime, "threshold", "timestamp authority"},
		{"stamped too late", trusting(plain, someone()), farm.Sign(t, provenance, someone(), issued, late), trust.ErrNoTime,
			"certificate was valid from", "timestamp authority"},
		{"stamped too early", trusting(plain, someone()),
			farm.Sign(t, provenance, someone(), issued, issued.Add(-time.Minute)), trust.ErrNoTime, "certificate was valid from",
			"timestamp authority"},
		{"stamped by a stranger", trusting(plain, someone()), stolen(), trust.ErrNoTime, "threshold", "timestamp authority"},
		{"in no log of certificates", trusting(farm.Root(t, log, nil), someone()), signed, trust.ErrOtherRoot,
			"no trusted certificate log", "trusted root"},
		{"in no log", trusting(farm.Root(t, nil, log), someone()), signed, trust.ErrNoTime, "not enough verified log entries",
			"a log"},
		{"payload changed", trusting(plain, someone()), flip(t, signed, "payload"), trust.ErrChanged, "sample authority", ""},
		{"only keys trusted", key.Verifier(t), signed, trust.ErrUnknownKey, "only keys are trusted", "public key"},
		{"only identities trusted", trusting(plain, someone()), s.Bundles[0], trust.ErrUnknownKey,
			"trusted signers are " + someone().String(), "public key"},
		{"no certificate", trusting(plain, someone()), bytes.Replace(signed, []byte(`"rawBytes"`), []byte(`"x"`), 1),
			trust.ErrMalformed, "", ""},
	}
	for _, row := range rows {
		st, err := row.v.Statement(row.bundle)
		if !fault.Is(err, fault.Unverified) || !errors.Is(err, row.is) || !strings.Contains(err.Error(), row.text) ||
			!strings.Contains(fault.Hint(err), row.hint) {
			t.Errorf("%s: Statement = %+v, %v (hint %q); want %v, %q, hint with %q", row.name, st, err, fault.Hint(err), row.is,
				row.text, row.hint)
		}
	}
	// A timestamp is for one signature. It does not fit if the signature changes.
	if _, err := trusting(plain, someone()).Statement(flip(t, signed, "signature")); !errors.Is(err, trust.ErrNoTime) &&
		!errors.Is(err, trust.ErrChanged) {
		t.Errorf("Statement(signature changed) = %v; want it refused", err)
	}
}

// someLog returns a transparency log that has no entries.
func someLog(t testing.TB) map[string]*root.TransparencyLog {
	t.Helper()
	key := testkit.NewKey(t).Private()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	h := crypto.SHA256.New()
	h.Write(der)
	id := h.Sum(nil)
	return map[string]*root.TransparencyLog{hex.EncodeToString(id): {
		BaseURL: "https://log.example.com", ID: id, ValidityPeriodStart: longAgo(), HashFunc: crypto.SHA256,
		PublicKey: key.Public(), SignatureHashFunc: crypto.SHA256,
	}}
}

// TestPublicSigstore verifies a provenance that GitHub signed with a certificate of Sigstore's public deployment. The
// provenance and the trusted root are files in the source of the library sigstore-go.
func TestPublicSigstore(t *testing.T) {
	t.Parallel()
	dir, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}",
		"github.com/sigstore/sigstore-go").Output()
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "pkg/testing/data", name))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	public := parseRoot(t, read("trusted-roots/public-good.json"))
	var b bundle.Bundle
	if err := b.UnmarshalJSON(read("bundles/sigstore.js@2.0.0-provenance.sigstore.json")); err != nil {
		t.Fatal(err)
	}
	b.MediaType = trust.ArtifactTypeBundle // the current format, which has one certificate and no chain
	material := b.GetVerificationMaterial()
	material.Content =
		&protobundle.VerificationMaterial_Certificate{Certificate: material.GetX509CertificateChain().GetCertificates()[0]}
	marshal := func() []byte {
		raw, err := protojson.Marshal(b.Bundle)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	github := trust.Identity{Pattern: `https://github\.com/sigstore/sigstore-js/.*`,
		Issuer: "https://token.actions.githubusercontent.com"}
	v := verifier(t, trust.Policy{Root: public, Identities: []trust.Identity{github}})
	st, err := v.Statement(marshal())
	if err != nil || st.PredicateType != trust.PredicateProvenance || st.KeyID != "" ||
		st.Identity != "https://github.com/sigstore/sigstore-js/.github/workflows/release.yml@refs/heads/main (https://token.actions.githubusercontent.com)" {
		t.Errorf("Statement = %+v, %v; want the provenance of a workflow", st, err)
	}
	material.TlogEntries = nil
	if st, err := v.Statement(marshal()); !errors.Is(err, trust.ErrNoTime) {
		t.Errorf("Statement without its log entry = %+v, %v; want %v", st, err, trust.ErrNoTime)
	}
}

func TestIdentityPolicy(t *testing.T) {
	t.Parallel()
	r := parseRoot(t, testkit.NewAuthority(t).Root(t, nil, nil))
	key := testkit.NewKey(t).Public(t)
	who := someone()
	for name, p := range map[string]trust.Policy{
		"root without identities": {Keys: []trust.PublicKey{key}, Root: r},
		"identities without root": {Keys: []trust.PublicKey{key}, Identities: []trust.Identity{who}},
		"nobody":                  {Root: r, Identities: []trust.Identity{{Issuer: who.Issuer}}},
		"no issuer":               {Root: r, Identities: []trust.Identity{{Subject: who.Subject}}},
		"name and pattern": {Root: r,
			Identities: []trust.Identity{{Subject: who.Subject, Pattern: ".*", Issuer: who.Issuer}}},
		"no pattern":                {Root: r, Identities: []trust.Identity{{Pattern: "(", Issuer: who.Issuer}}},
		"a pattern that breaks out": {Root: r, Identities: []trust.Identity{{Pattern: "x)|(?:", Issuer: who.Issuer}}},
	} {
		if _, err := trust.NewVerifier(p); !fault.Is(err, fault.Usage) || fault.Hint(err) == "" {
			t.Errorf("%s: NewVerifier = %v, hint %q; want kind usage and a hint", name, err, fault.Hint(err))
		}
	}
}

func TestParseRootRefuses(t *testing.T) {
	t.Parallel()
	good := testkit.NewAuthority(t).Root(t, nil, nil)
	without := func(name string) string {
		var fields map[string]any
		if err := json.Unmarshal(good, &fields); err != nil {
			t.Fatal(err)
		}
		delete(fields, name)
		raw, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	parseRoot(t, []byte(without("tlogs")))
	for name, text := range map[string]string{
		"empty": "", "no JSON": "x", "of another kind": without("mediaType"),
		"no authority": without("certificateAuthorities"), "no time": without("timestampAuthorities"),
		"huge": string(good) + strings.Repeat(" ", 2<<20),
	} {
		if r, err := trust.ParseRoot([]byte(text)); !fault.Is(err, fault.Usage) ||
			!strings.Contains(fault.Hint(err), "trusted_root.json") {
			t.Errorf("%s: ParseRoot = %v, %v; want kind usage and a hint", name, r, err)
		}
	}
}

func FuzzParseRoot(f *testing.F) {
	farm := testkit.NewAuthority(f)
	key := testkit.NewKey(f)
	s := testkit.NewSample(f, key, testkit.SampleKernel("47"), driver, "")
	provenance, _ := payloads(f, s)
	signed := farm.Sign(f, provenance, someone(), longAgo(), longAgo())
	f.Add(farm.Root(f, nil, nil))
	f.Add(farm.Root(f, someLog(f), someLog(f)))
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.trustedroot+json;version=0.1","certificateAuthorities":[{}],"timestampAuthorities":[{}],"tlogs":[{}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := trust.ParseRoot(text)
		if err != nil {
			if !fault.Is(err, fault.Usage) {
				t.Errorf("ParseRoot = %v of kind %v; want usage", err, fault.Of(err))
			}
			return
		}
		// A verifier must be able to use every root that ParseRoot accepts, whatever the root contains.
		_, _ = verifier(t, trust.Policy{Root: r, Identities: []trust.Identity{someone()}}).Statement(signed)
	})
}
