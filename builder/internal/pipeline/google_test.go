package pipeline_test

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"

	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

// google has a key and its certificate. With the key, a test signs modules in Google's place.
type google struct {
	key, certPath string
	certs         []*x509.Certificate
}

func newGoogle(t *testing.T) google {
	t.Helper()
	g := google{}
	g.key, g.certPath = moduleKey(t)
	var err error
	if g.certs, err = modsign.ReadCertificates(g.certPath); err != nil {
		t.Fatal(err)
	}
	return g
}

// sign returns the given modules with signatures of the key appended.
func (g google) sign(t *testing.T, modules map[string][]byte) map[string][]byte {
	t.Helper()
	signer, err := modsign.Load(t.Context(), g.key, g.certPath)
	if err != nil {
		t.Fatal(err)
	}
	signed := map[string][]byte{}
	for name, module := range modules {
		src, dst := filepath.Join(t.TempDir(), "plain"), filepath.Join(t.TempDir(), "signed")
		if err := os.WriteFile(src, module, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := signer.Sign(t.Context(), src, dst, "sha256"); err != nil {
			t.Fatal(err)
		}
		if signed[name], err = os.ReadFile(dst); err != nil {
			t.Fatal(err)
		}
	}
	return signed
}

// files returns the files of a signature archive for the given modules, as Google publishes it.
func (g google) files(t *testing.T, modules map[string][]byte) map[string]string {
	t.Helper()
	files := map[string]string{"gpu-driver-cert.der": string(g.certs[0].Raw), "gsp_tu10x.bin.sig": "\x03\x02ima"}
	for name, data := range g.sign(t, modules) {
		_, signature, err := modsign.Split(data)
		if err != nil {
			t.Fatal(err)
		}
		files[name+".ko.sig"] = string(signature)
	}
	return files
}

func tgz(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var out bytes.Buffer
	tarOf(t, files, gzip.NewWriter(&out))
	return out.Bytes()
}

// withEmptyRegistry returns a copy of the farm with a new, empty registry.
func (f farm) withEmptyRegistry(t *testing.T) *farm {
	t.Helper()
	f.repo = testkit.Registry(t, true) + "/prebake/driver"
	return &f
}

func note(res *pipeline.Result, phase string) string {
	for _, p := range res.Phases {
		if p.Name == phase {
			return p.Note
		}
	}
	return ""
}

// materialsOf returns the names of the inputs in an artifact's provenance.
func (f *farm) materialsOf(t *testing.T, res *pipeline.Result) (names []string) {
	t.Helper()
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := repo.Attached(t.Context(), res.Digest, trust.ArtifactTypeBundle)
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range f.verifier(t).Statements(bundles, res.Digest, trust.PredicateProvenance) {
		var p struct {
			BuildDefinition struct {
				ResolvedDependencies []struct{ Name string } `json:"resolvedDependencies"`
			} `json:"buildDefinition"`
		}
		if err := json.Unmarshal(st.Predicate, &p); err != nil {
			t.Fatal(err)
		}
		for _, m := range p.BuildDefinition.ResolvedDependencies {
			names = append(names, m.Name)
		}
	}
	return names
}

// unstampedModules returns the modules of an artifact without Prebake's stamp, as the compiler made them.
func (f *farm) unstampedModules(t *testing.T, res *pipeline.Result) map[string][]byte {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(filepath.Dir(f.module(t, res)), "*.ko"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]byte{}
	for _, path := range found {
		if all[strings.TrimSuffix(filepath.Base(path), ".ko")], err = modcheck.Unstamped(path); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// twoModules returns the files of a release with two modules. Neither module needs the other.
func twoModules() map[string]string {
	files := driverFiles()
	files["kernel-open/Kbuild"] += "obj-m += nvidia-uvm.o\n"
	files["kernel-open/Makefile"] += "\t@sed s/name=nvidia/name=nvidia_uvm/ nv.c > uvm.c\n\t@$(CC) -c uvm.c -o " +
		"nvidia-uvm.ko\n"
	return files
}

const (
	archiveName = "nvidia-drivers-" + version + "-signature.tar.gz"
	lakitu9     = "cos/17800.0.9/lakitu/"
	signPhase   = "sign modules"
)

var wholeSigned = slices.Insert(slices.Clone(whole), 3, signPhase)

// TestGoogleSignatures checks that Google's signatures are attached if Google signed exactly these modules. Equal
// inputs must give the same artifact.
func TestGoogleSignatures(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.driver(t, twoModules())
	cfg := f.config(t, emptyCache(t))
	plain := must(t, cfg, request("17800.0.9"))
	modules := f.unstampedModules(t, plain)
	if len(modules) != 2 {
		t.Fatalf("the driver has modules %v; want two", slices.Collect(maps.Keys(modules)))
	}
	g := newGoogle(t)
	f.put(t, lakitu9+"extensions/gpu/"+archiveName, tgz(t, g.files(t, modules)))
	f.put(t, lakitu9+"trusted_key.pem", g.certs[0].Raw)

	// The first build published the artifact with unsigned modules. It stays published, because a tag never moves.
	if again := must(t, cfg, request("17800.0.9")); !again.Reused || again.Digest != plain.Digest {
		t.Errorf("published before the signatures came: %+v; want it reused", again)
	}
	f = f.withEmptyRegistry(t)
	cfg.Destinations = []string{f.repo}
	res := must(t, cfg, request("17800.0.9"))
	if diff := cmp.Diff(wholeSigned, phases(res)); diff != "" || res.Digest == plain.Digest ||
		note(res, signPhase) != "2 of Google's signatures" {
		t.Errorf("the artifact with signatures is %s, without %s; note %q, phases (-want +got):\n%s", res.Digest,
			plain.Digest, note(res, signPhase), diff)
	}
	f.checkArtifact(t, res, 4)
	for name, module := range modules {
		path := filepath.Join(filepath.Dir(f.module(t, res)), name+".ko")
		if _, err := modsign.VerifyFile(path, g.certs); err != nil {
			t.Errorf("the published %s: %v", name, err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if body, _, err := modsign.Split(data); err != nil || !bytes.Equal(body, module) {
			t.Errorf("the published %s is not the one that Google signed: %v", name, err)
		}
	}
	if got := f.materialsOf(t, res); !slices.Contains(got, archiveName) || !slices.Contains(got, "trusted_key.pem") {
		t.Errorf("the provenance has the inputs %q; want Google's signatures and root among them", got)
	}

	// With an empty cache, Make must make both artifacts again: the signed one and the unsigned one.
	for mode, want := range map[pipeline.GoogleSignatures]string{pipeline.GoogleRequire: res.Digest,
		pipeline.GoogleOff: plain.Digest} {
		req := request("17800.0.9")
		req.GoogleSignatures = mode
		made, err := pipeline.Make(t.Context(), cfg, req, emptyCache(t), &bytes.Buffer{}, &timeline.Run{})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := made.Image.Digest(); err != nil || got.String() != want {
			t.Errorf("Make with Google's signatures %q = %s, %v; want %s", mode, got, err, want)
		}
		signed := slices.ContainsFunc(made.Materials, func(m sign.Material) bool { return m.Name == archiveName })
		if signed != (mode == pipeline.GoogleRequire) {
			t.Errorf("Make with Google's signatures %q has the inputs %+v", mode, made.Materials)
		}
	}

	// Two sibling kernels have the same fingerprint as the first kernel. For 17800.0.10 there are no signatures by Google.
	// 17800.0.11 has another root certificate.
	f.kernel(t, "17800.0.10", headerFiles())
	f.kernel(t, "17800.0.11", headerFiles())
	f.put(t, "cos/17800.0.11/lakitu/extensions/gpu/"+archiveName, tgz(t, g.files(t, modules)))
	f.put(t, "cos/17800.0.11/lakitu/trusted_key.pem", newGoogle(t).certs[0].Raw)
	for _, row := range []struct {
		build string
		mode  pipeline.GoogleSignatures
		kind  fault.Kind // 0 means that the build reuses the artifact
	}{
		{"17800.0.9", pipeline.GoogleAuto, 0}, {"17800.0.9", pipeline.GoogleRequire, 0},
		{"17800.0.10", pipeline.GoogleAuto, 0},
		{"17800.0.9", pipeline.GoogleOff, fault.PublishRefused}, {"17800.0.10", pipeline.GoogleRequire, fault.InputMissing},
		{"17800.0.11", pipeline.GoogleRequire, fault.CheckFailed},
	} {
		cfg.GoogleSignatures = row.mode
		again, _, err := build(t, cfg, request(row.build))
		if row.kind == 0 && (err != nil || !again.Reused || again.Digest != res.Digest) || row.kind != 0 &&
			!fault.Is(err, row.kind) {
			t.Errorf("%s with Google's signatures %q: %+v, %v; want %v, 0 is reused", row.build, row.mode, again, err, row.kind)
		}
	}
}

// TestGoogleSignaturesLeftOut has signatures by Google that do not fit the modules. The artifact must be the same as
// without signatures.
func TestGoogleSignaturesLeftOut(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.driver(t, twoModules())
	cfg := f.config(t, emptyCache(t))
	plain := must(t, cfg, request("17800.0.9"))
	modules, g := f.unstampedModules(t, plain), newGoogle(t)
	other := maps.Clone(modules)
	other["nvidia-uvm"] = append(bytes.Clone(modules["nvidia-uvm"]), 0)
	one := maps.Clone(modules)
	delete(one, "nvidia-uvm")
	oldName, newer := "cos/17800.0.9/extensions/gpu/"+version+".signature.tar.gz", lakitu9+"extensions/gpu/"+archiveName
	for _, row := range []struct {
		name, object string
		modules      map[string][]byte
		root         []byte
		why          string
	}{
		{"one module has other bytes", newer, other, g.certs[0].Raw,
			"the signature for module nvidia-uvm was made over other bytes"},
		{"one module has no signature, in the older layout", oldName, one, nil,
			"the archive has no signature for module nvidia-uvm"},
		{"another root", newer, modules, newGoogle(t).certs[0].Raw, "which the kernel's root certificate did not certify"},
	} {
		f.put(t, row.object, tgz(t, g.files(t, row.modules)))
		if row.root != nil {
			f.put(t, lakitu9+"trusted_key.pem", row.root)
		}
		there := f.withEmptyRegistry(t)
		cfg.Destinations, cfg.GoogleSignatures = []string{there.repo}, pipeline.GoogleAuto
		res := must(t, cfg, request("17800.0.9"))
		if diff := cmp.Diff(wholeSigned, phases(res)); diff != "" || res.Digest != plain.Digest ||
			!strings.Contains(note(res, signPhase), row.why) {
			t.Errorf("%s: %s, note %q; want %s as without, %q; phases (-want +got):\n%s", row.name, res.Digest,
				note(res, signPhase), plain.Digest, row.why, diff)
		}
		if got := there.materialsOf(t, res); slices.Contains(got, filepath.Base(row.object)) {
			t.Errorf("%s: the provenance has the inputs %q; want no signature archive, because no signature was attached",
				row.name, got)
		}
		cfg.GoogleSignatures = pipeline.GoogleRequire
		cfg.Destinations = []string{f.withEmptyRegistry(t).repo}
		if res, _, err := build(t, cfg, request("17800.0.9")); !fault.Is(err, fault.CheckFailed) ||
			!strings.Contains(fault.Hint(err), "--google-signatures auto") {
			t.Errorf("%s, required: %+v, %v, hint %q; want check failed", row.name, res, err, fault.Hint(err))
		}
		for _, name := range []string{row.object, lakitu9 + "trusted_key.pem"} {
			if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
	}
}

// TestHostileGoogleSignatures checks that a signature archive with forged content ends the build.
func TestHostileGoogleSignatures(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config(t, emptyCache(t))
	modules, g := f.unstampedModules(t, must(t, cfg, request("17800.0.9"))), newGoogle(t)
	good := g.files(t, modules)
	with := func(name, content string) []byte {
		files := maps.Clone(good)
		files[name] = content
		return tgz(t, files)
	}
	for _, row := range []struct {
		name    string
		archive []byte
		kind    fault.Kind
		phases  []string
	}{
		{"a path that leads out", with("../nvidia-uvm.ko.sig", "x"), fault.CheckFailed, whole[:1]},
		{"more than a signature archive holds", make([]byte, 17<<20), fault.Unsupported, whole[:1]},
		{"a certificate that is none", with("gpu-driver-cert.der", "x"), fault.CheckFailed, whole[:1]},
		{"the certificate of somebody else", with("gpu-driver-cert.der", string(newGoogle(t).certs[0].Raw)),
			fault.CheckFailed, wholeSigned[:4]},
	} {
		f.put(t, lakitu9+"extensions/gpu/"+archiveName, row.archive)
		there := f.withEmptyRegistry(t)
		cfg.Destinations = []string{there.repo}
		res, _, err := build(t, cfg, request("17800.0.9"))
		if diff := cmp.Diff(row.phases, phases(res)); diff != "" || !fault.Is(err, row.kind) || fault.Hint(err) == "" {
			t.Errorf("%s: %v, hint %q; want %v; phases (-want +got):\n%s", row.name, err, fault.Hint(err), row.kind, diff)
		}
	}
	cfg.GoogleSignatures = pipeline.GoogleOff
	if _, log, err := build(t, cfg, request("17800.0.9")); err != nil {
		t.Errorf("with Google's signatures off, as the hint says: %v\n%s", err, log)
	}
}

// TestGoogleModules checks a build that takes Google's modules. They must be published unchanged, and nothing may be
// compiled.
func TestGoogleModules(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	both := driverFiles()
	for _, file := range []string{"Kbuild", "Makefile", "nv.c"} {
		both["kernel/"+file] = both["kernel-open/"+file]
	}
	f.driver(t, both)
	cfg := f.config(t, emptyCache(t))
	plain := must(t, cfg, request("17800.0.9"))
	g := newGoogle(t)
	signed := g.sign(t, f.unstampedModules(t, plain))
	f = f.withEmptyRegistry(t)
	cfg.Destinations, cfg.GoogleModules = []string{f.repo}, true
	refused := func(what string, r pipeline.Request, kind fault.Kind, hint string) {
		t.Helper()
		if res, _, err := build(t, cfg, r); !fault.Is(err, kind) || !strings.Contains(fault.Hint(err), hint) ||
			res.Digest != "" {
			t.Errorf("%s: %s, %v, hint %q; want %v, %q", what, res.Digest, err, fault.Hint(err), kind, hint)
		}
	}
	refused("none there", request("17800.0.9"), fault.InputMissing, "without --google-modules")
	archive := tgz(t, map[string]string{"drivers/nvidia.ko": string(signed["nvidia"]),
		"firmware/nvidia/" + version + "/gsp_tu10x.bin": "gsp"})
	for _, build := range []string{"17800.0.9", "17800.0.10", "17800.0.11"} { // all three kernels have one fingerprint
		f.kernel(t, build, headerFiles())
		f.put(t, "cos/"+build+"/lakitu/nvidia-drivers-"+version+".tgz", archive)
	}
	refused("no root", request("17800.0.9"), fault.InputMissing, "--module-cert")
	f.put(t, lakitu9+"trusted_key.pem", newGoogle(t).certs[0].Raw)
	refused("another root", request("17800.0.9"), fault.CheckFailed, "--google-modules")
	proprietary := request("17800.0.9")
	proprietary.Flavour = target.Proprietary
	refused("another flavour", proprietary, fault.Unsupported, "without --google-modules")

	f.put(t, lakitu9+"trusted_key.pem", g.certs[0].Raw)
	res := must(t, cfg, request("17800.0.9"))
	want := slices.Clone(whole)
	want[2] = "take modules"
	if diff := cmp.Diff(want, phases(res)); diff != "" {
		t.Errorf("phases (-want +got):\n%s", diff)
	}
	if got, err := os.ReadFile(f.module(t, res)); err != nil || !bytes.Equal(got, signed["nvidia"]) {
		t.Errorf("the published module has %d bytes, %v; want the %d that Google signed", len(got), err,
			len(signed["nvidia"]))
	}
	if got := f.materialsOf(t, res); !slices.Contains(got, "nvidia-drivers-"+version+".tgz") ||
		!slices.Contains(got, "trusted_key.pem") {
		t.Errorf("the provenance has the inputs %q; want Google's archive and root among them", got)
	}
	req := request("17800.0.9")
	req.GoogleModules = true
	made, err := pipeline.Make(t.Context(), cfg, req, emptyCache(t), &bytes.Buffer{}, &timeline.Run{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := made.Image.Digest(); err != nil || got.String() != res.Digest {
		t.Errorf("Make = %s, %v; want %s", got, err, res.Digest)
	}

	// For a sibling kernel Google published another archive. The build can use the published artifact if both kernels
	// trust the same root certificate.
	files := map[string]string{"drivers/nvidia.ko": string(signed["nvidia"]), "README": "made for another build"}
	f.put(t, "cos/17800.0.10/lakitu/nvidia-drivers-"+version+".tgz", tgz(t, files))
	f.put(t, "cos/17800.0.10/lakitu/trusted_key.pem", g.certs[0].Raw)
	f.put(t, "cos/17800.0.11/lakitu/trusted_key.pem", newGoogle(t).certs[0].Raw)
	if again := must(t, cfg, request("17800.0.10")); !again.Reused || again.Digest != res.Digest {
		t.Errorf("a sibling with the same root: %+v; want it reused", again)
	}
	refused("the same archive, but another root", request("17800.0.11"), fault.CheckFailed, "which certificate")
	// A build that compiles modules must not reuse an artifact with Google's modules.
	cfg.GoogleModules = false
	if _, _, err := build(t, cfg, request("17800.0.9")); !fault.Is(err, fault.PublishRefused) {
		t.Errorf("a build of compiled modules, where an artifact with Google's modules is: %v; want it refused", err)
	}
}
