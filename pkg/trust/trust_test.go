package trust_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

var driver = target.Driver{Version: "535.261.03", Flavour: target.Open}

func TestVerify(t *testing.T) {
	t.Parallel()
	key := testkit.NewKey(t)
	s := testkit.NewSample(t, key, testkit.SampleKernel("47"), driver, "")
	got, err := key.Verifier(t).Verify(s.Bundles, s.Expect())
	if err != nil {
		t.Fatalf("Verify = %v", err)
	}
	if got.KeyID != key.Public(t).ID() || got.BuilderID != "https://example.com/builder" || got.InvocationID != "run-1" ||
		got.Built.Driver != driver || got.Match.Kernel != s.Kernel || len(got.Materials) != 1 || len(got.Ignored) != 0 {
		t.Errorf("Verify = %+v", got)
	}
	if text := got.String(); !strings.Contains(text, "535.261.03-open") || !strings.Contains(text, "17800.0.47/lakitu") {
		t.Errorf("Verdict = %q; want driver and kernel in it", text)
	}
}

// flipByte changes byte n of the data that a base64 text encodes.
func flipByte(t *testing.T, text string, n int) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	raw[n] ^= 1
	return base64.StdEncoding.EncodeToString(raw)
}

// flip changes one byte in the given field of a bundle's envelope.
func flip(t *testing.T, raw []byte, field string) []byte {
	t.Helper()
	var b map[string]any
	if err := json.Unmarshal(raw, &b); err != nil {
		t.Fatal(err)
	}
	env := b["dsseEnvelope"].(map[string]any)
	switch field {
	case "payload":
		env["payload"] = flipByte(t, env["payload"].(string), 40)
	case "signature":
		sig := env["signatures"].([]any)[0].(map[string]any)
		sig["sig"] = flipByte(t, sig["sig"].(string), 20)
	case "payloadType":
		env["payloadType"] = "text/plain"
	}
	out, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestVerifyRefuses(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	k47, k50 := testkit.SampleKernel("47"), testkit.SampleKernel("50")
	s := testkit.NewSample(t, key, k47, driver, "")
	foreign := testkit.NewSample(t, stranger, k47, driver, "")
	sibling := testkit.NewSample(t, key, k50, driver, "")
	prov, match := s.Bundles[0], s.Bundles[1]
	params := trust.Parameters{Kernel: k47, Fingerprint: s.Identity.Fingerprint, Driver: driver}
	twin := k47 // another COS build with the same kernel
	twin.BuildID = "17800.1.47"
	twinMatch := key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: twin, Fingerprint: s.Identity.Fingerprint})
	spoiled := func(f func(p map[string]any)) []byte {
		p := testkit.ProvenancePredicate(params)
		f(p)
		return key.Statement(t, s.Digest, trust.PredicateProvenance, p)
	}
	provFor := func(f func(p *trust.Parameters)) []byte {
		p := params
		f(&p)
		return key.Provenance(t, s.Digest, p)
	}
	matchFor := func(f func(k *target.Kernel)) []byte {
		m := trust.KernelMatch{Kernel: k47, Fingerprint: s.Identity.Fingerprint}
		f(&m.Kernel)
		return key.KernelMatch(t, s.Digest, m)
	}
	statement := func(kind string, subjects int) []byte {
		subject := fmt.Sprintf(`{"name":"x","digest":{"sha256":%q}}`, strings.TrimPrefix(s.Digest, "sha256:"))
		predicate, err := json.Marshal(testkit.ProvenancePredicate(params))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Appendf(nil, `{"_type":%q,"subject":[%s],"predicateType":%q,"predicate":%s}`,
			kind, strings.Repeat(subject+",", subjects-1)+subject, trust.PredicateProvenance, predicate)
	}
	expect := func(f func(e *trust.Expect)) trust.Expect {
		e := s.Expect()
		f(&e)
		return e
	}
	same := s.Expect()
	rows := []struct {
		name    string
		bundles [][]byte
		expect  trust.Expect
		kind    fault.Kind
		is      error
		text    string
	}{
		{"nothing attached", nil, same, fault.Unverified, trust.ErrNoProvenance, "no provenance attached"},
		{"no provenance", [][]byte{match}, same, fault.Unverified, trust.ErrNoProvenance, "no provenance attached"},
		{"no kernel match", [][]byte{prov}, same, fault.Unverified, trust.ErrNoKernelMatch, "no kernel match attached"},
		{"unknown key", foreign.Bundles, same, fault.Unverified, trust.ErrUnknownKey,
			"key " + stranger.Public(t).ID() + "; trusted signers are " + key.Public(t).ID()},
		{"payload changed", [][]byte{flip(t, prov, "payload"), match}, same, fault.Unverified, trust.ErrChanged,
			"the payload or the signature changed"},
		{"signature changed", [][]byte{flip(t, prov, "signature"), match}, same, fault.Unverified, trust.ErrChanged,
			"the payload or the signature changed"},
		{"match changed", [][]byte{prov, flip(t, match, "payload")}, same, fault.Unverified, trust.ErrChanged,
			"no kernel match attached that is valid"},
		{"another payload type", [][]byte{flip(t, prov, "payloadType"), match}, same, fault.Unverified, trust.ErrMalformed,
			"malformed"},
		{"not JSON", [][]byte{[]byte("{"), match}, same, fault.Unverified, trust.ErrMalformed, "malformed"},
		{"too long", [][]byte{append(bytes.Clone(prov), make([]byte, trust.MaxBundleSize)...), match}, same, fault.Unverified,
			trust.ErrMalformed, "at most"},
		{"about another artifact", sibling.Bundles, same, fault.Unverified, trust.ErrOtherDigest, sibling.Digest},
		{"another build of the kernel", [][]byte{prov, twinMatch}, same, fault.Mismatch, trust.ErrOtherKernel,
			"the artifact has a kernel match for COS 17800.1.47/lakitu; this node runs COS 17800.0.47/lakitu"},
		{"sibling kernel's node", s.Bundles, expect(func(e *trust.Expect) { e.Kernel = k50 }), fault.Mismatch,
			trust.ErrOtherKernel, "release"},
		{"sibling kernel's node, release unknown", s.Bundles,
			expect(func(e *trust.Expect) { e.Kernel = target.Kernel{BuildID: "17800.0.50", Board: "lakitu"} }),
			fault.Mismatch, trust.ErrOtherKernel,
			"the artifact has a kernel match for COS 17800.0.47/lakitu; this node runs COS 17800.0.50/lakitu"},
		{"another board", s.Bundles, expect(func(e *trust.Expect) { e.Kernel.Board = "anthos-amd64-vanilla" }),
			fault.Mismatch, trust.ErrOtherKernel, "anthos"},
		{"another commit", [][]byte{prov,
			key.KernelMatch(t, s.Digest,
				trust.KernelMatch{Kernel: func() target.Kernel { k := k47; k.Commit = strings.Repeat("a", 40); return k }(),
					Fingerprint: s.Identity.Fingerprint})},
			expect(func(e *trust.Expect) { e.Kernel.Commit = strings.Repeat("b", 40) }), fault.Mismatch, trust.ErrOtherKernel,
			"commit"},
		{"another architecture", s.Bundles, expect(func(e *trust.Expect) { e.Kernel.Arch = target.ARM64 }), fault.Mismatch,
			trust.ErrOtherKernel, "arm64"},
		{"another architecture in the artifact", s.Bundles, expect(func(e *trust.Expect) { e.Identity.Arch = target.ARM64 }),
			fault.Mismatch, trust.ErrOtherKernel, "the artifact is for architecture arm64"},
		{"match for another release", [][]byte{prov, matchFor(func(k *target.Kernel) { k.Release = "6.6.1" })}, same,
			fault.Mismatch, trust.ErrOtherKernel, "has kernel release 6.6.1"},
		{"match for another architecture", [][]byte{prov, matchFor(func(k *target.Kernel) { k.Arch = target.ARM64 })}, same,
			fault.Mismatch, trust.ErrOtherKernel, "has architecture arm64"},
		{"another driver asked for", s.Bundles, expect(func(e *trust.Expect) { e.Driver.Flavour = target.Proprietary }),
			fault.Mismatch, trust.ErrOtherDriver, "535.261.03-proprietary"},
		{"annotations of another driver", s.Bundles,
			expect(func(e *trust.Expect) { e.Driver.Version = "535.309.01"; e.Identity.Driver = e.Driver }),
			fault.Mismatch, trust.ErrOtherIdentity, "provenance is for driver"},
		{"annotations of another fingerprint", s.Bundles,
			expect(func(e *trust.Expect) { e.Identity.Fingerprint = sibling.Identity.Fingerprint }),
			fault.Mismatch, trust.ErrOtherIdentity, "fingerprint"},
		{"match of another fingerprint",
			[][]byte{prov, key.KernelMatch(t, s.Digest,
				trust.KernelMatch{Kernel: k47, Fingerprint: sibling.Identity.Fingerprint})},
			same, fault.Mismatch, trust.ErrOtherIdentity, "kernel match is for ABI fingerprint"},
		{"provenance of another release", [][]byte{provFor(func(p *trust.Parameters) { p.Kernel.Release = "6.6.1" }), match},
			same, fault.Mismatch, trust.ErrOtherIdentity, "6.6.1"},
		{"provenance of another architecture",
			[][]byte{provFor(func(p *trust.Parameters) { p.Kernel.Arch = target.ARM64 }), match}, same, fault.Mismatch,
			trust.ErrOtherIdentity, "arm64"},
		{"provenance of another fingerprint",
			[][]byte{provFor(func(p *trust.Parameters) { p.Fingerprint = sibling.Identity.Fingerprint }), match},
			same, fault.Mismatch, trust.ErrOtherIdentity, "provenance is for ABI fingerprint"},
		{"another statement type", [][]byte{key.Sign(t, statement("https://in-toto.io/Statement/v0.1", 1)), match}, same,
			fault.Unverified, trust.ErrMalformed, "statement v1"},
		{"too many subjects", [][]byte{key.Sign(t, statement("https://in-toto.io/Statement/v1", 65)), match}, same,
			fault.Unverified, trust.ErrMalformed, "at most 64"},
		{"another media type", [][]byte{bytes.Replace(prov, []byte("bundle.v0.3+json"), []byte("bundle.v0.2+json"), 1),
			match}, same, fault.Unverified, trust.ErrMalformed, "malformed"},
		{"another build type", [][]byte{spoiled(func(p map[string]any) {
			p["buildDefinition"].(map[string]any)["buildType"] = "https://example.com/x"
		}), match},
			same, fault.Unverified, nil, "build type"},
		{"no builder", [][]byte{spoiled(func(p map[string]any) { delete(p, "runDetails") }), match}, same, fault.Unverified,
			nil, "no builder"},
		{"parameters of another type", [][]byte{spoiled(func(p map[string]any) { p["buildDefinition"] = "x" }), match}, same,
			fault.Unverified, trust.ErrMalformed, "provenance"},
		{"bad expectation", s.Bundles, expect(func(e *trust.Expect) { e.Kernel.BuildID = "" }), fault.Usage, nil, "BUILD_ID"},
	}
	v := key.Verifier(t)
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			got, err := v.Verify(row.bundles, row.expect)
			if err == nil {
				t.Fatalf("Verify = %v; want an error", got)
			}
			if !fault.Is(err, row.kind) || row.is != nil && !errors.Is(err, row.is) || !strings.Contains(err.Error(), row.text) {
				t.Errorf("Verify = %v (%v); want %v, %v, %q", err, fault.Of(err), row.kind, row.is, row.text)
			}
		})
	}
}

func TestJunkDoesNotPoison(t *testing.T) {
	t.Parallel()
	key, stranger := testkit.NewKey(t), testkit.NewKey(t)
	k47 := testkit.SampleKernel("47")
	s := testkit.NewSample(t, key, k47, driver, "")
	foreign := testkit.NewSample(t, stranger, k47, driver, "")
	other := testkit.NewSample(t, key, testkit.SampleKernel("50"), driver, "")
	twin := k47
	twin.BuildID = "17800.1.47"
	junk := [][]byte{
		nil, []byte("junk"), []byte(`{"mediaType":"` + trust.ArtifactTypeBundle + `"}`), foreign.Bundles[0],
		foreign.Bundles[1],
		other.Bundles[0], flip(t, s.Bundles[0], "payload"),
		key.Statement(t, s.Digest, "https://example.com/x", map[string]string{"a": "b"}),
		key.KernelMatch(t, s.Digest, trust.KernelMatch{Kernel: twin, Fingerprint: s.Identity.Fingerprint}),
	}
	got, err := key.Verifier(t).Verify(append(junk, s.Bundles...), s.Expect())
	if err != nil {
		t.Fatalf("Verify(junk and valid) = %v", err)
	}
	if len(got.Ignored) != len(junk) {
		t.Errorf("Ignored = %q; want %d reasons", got.Ignored, len(junk))
	}
	if _, err := key.Verifier(t).Verify(junk, s.Expect()); err == nil {
		t.Error("Verify(junk) succeeded")
	}
	var many [][]byte
	for range trust.MaxBundles {
		many = append(many, []byte("junk"))
	}
	if _, err := key.Verifier(t).Verify(append(many, s.Bundles...), s.Expect()); !fault.Is(err, fault.Unverified) {
		t.Errorf("Verify(valid behind %d others) = %v; want the valid bundles ignored", trust.MaxBundles, err)
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	if _, err := trust.NewVerifier(trust.Policy{}); !fault.Is(err, fault.Usage) {
		t.Errorf("NewVerifier without keys = %v; want kind usage", err)
	}
	a, b := testkit.NewKey(t), testkit.NewKey(t)
	s := testkit.NewSample(t, b, testkit.SampleKernel("47"), driver, "")
	keys, err := trust.ParsePublicKeys(append(a.PEM(t), b.PEM(t)...))
	if err != nil || len(keys) != 2 {
		t.Fatalf("ParsePublicKeys(two) = %v, %v", keys, err)
	}
	for _, row := range []struct {
		builders []string
		ok       bool
	}{{nil, true}, {[]string{"x", "https://example.com/builder"}, true}, {[]string{"https://example.com/other"}, false}} {
		v, err := trust.NewVerifier(trust.Policy{Keys: keys, Builders: row.builders})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(s.Bundles, s.Expect()); (err == nil) != row.ok {
			t.Errorf("Verify with builders %v = %v; want success %v", row.builders, err, row.ok)
		}
	}
}

// p384 is the beginning of a P-384 public key. The key was made with: openssl ecparam -name secp384r1 -genkey | openssl
// ec -pubout
const p384 = `-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE
-----END PUBLIC KEY-----
`

func TestParsePublicKeysRefuses(t *testing.T) {
	t.Parallel()
	good := string(testkit.NewKey(t).PEM(t))
	for name, text := range map[string]string{
		"empty": "", "white space": " \n", "text": "hello", "text before": "x\n" + good, "text behind": good + "x",
		"cut":          good[:60],
		"another type": strings.ReplaceAll(good, "PUBLIC KEY", "PRIVATE KEY"), "broken key": p384,
		"huge": good + strings.Repeat(" ", 70000), "too many": strings.Repeat(good, 65),
	} {
		if keys, err := trust.ParsePublicKeys([]byte(text)); !fault.Is(err, fault.Usage) {
			t.Errorf("%s: ParsePublicKeys = %v, %v; want kind usage", name, keys, err)
		}
	}
}

func FuzzParsePublicKeys(f *testing.F) {
	f.Add(testkit.NewKey(f).PEM(f))
	f.Add([]byte(p384))
	f.Add([]byte("-----BEGIN "))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, err := trust.ParsePublicKeys(text)
		if (err == nil) != (len(keys) > 0) {
			t.Errorf("ParsePublicKeys = %v, %v", keys, err)
		}
	})
}

// FuzzVerify checks that Statement accepts a Sigstore bundle only if the trusted key or the trusted identity signed it.
func FuzzVerify(f *testing.F) {
	key, farm := testkit.NewKey(f), testkit.NewAuthority(f)
	s := testkit.NewSample(f, key, testkit.SampleKernel("47"), driver, "")
	v := verifier(f, trust.Policy{Keys: []trust.PublicKey{key.Public(f)}, Root: parseRoot(f, farm.Root(f, nil, nil)),
		Identities: []trust.Identity{someone()}})
	provenance, _ := payloads(f, s)
	want, err := v.Statement(s.Bundles[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s.Bundles[0])
	f.Add(s.Bundles[1])
	f.Add(farm.Sign(f, provenance, someone(), longAgo(), longAgo()))
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":""}},"dsseEnvelope":{"payload":"","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":""}]}}`))
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"certificate":{"rawBytes":""},"tlogEntries":[{}]},"messageSignature":{}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		st, err := v.Statement(raw)
		if err != nil {
			if !fault.Is(err, fault.Unverified) {
				t.Errorf("Statement = %v of kind %v; want unverified", err, fault.Of(err))
			}
			return
		}
		if !st.About(s.Digest) || st.PredicateType != want.PredicateType && st.PredicateType != trust.PredicateKernelMatch {
			t.Errorf("Statement = %+v; nobody signed that", st)
		}
		_, _ = v.Verify([][]byte{raw, s.Bundles[0], s.Bundles[1]}, s.Expect())
	})
}
