package pipeline_test

import (
	"archive/tar"
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
)

const (
	version = "535.261.03"
	headers = "usr/src/linux-headers-6.1.0-9-test/"
)

// headerFiles returns a small header tree. A file whose name ends in * is executable.
func headerFiles() map[string]string {
	return map[string]string{
		headers + "Makefile": "all:\n", headers + ".config": "CONFIG_64BIT=y\nCONFIG_SMP=y\nCONFIG_MODULE_UNLOAD=y\n",
		headers + "Module.symvers":                "0x00000000\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n",
		headers + "include/config/kernel.release": "6.1.0-9-test\n",
	}
}

func toolchainFiles() map[string]string {
	files := map[string]string{}
	for _, tool := range []string{"gcc", "ld", "strip"} {
		files["bin/x86_64-cros-linux-gnu-"+tool+"*"] = "#!/bin/sh\nexec /usr/bin/" + tool + " \"$@\"\n"
	}
	return files
}

// driverFiles returns the files of a release with one module. The module's .modinfo has the fields of a real module.
func driverFiles() map[string]string {
	return map[string]string{
		"kernel-open/Kbuild":   "obj-m += nvidia.o\n",
		"kernel-open/Makefile": "modules:\n\t@echo '  CC [M]  nv.o'\n\t@$(CC) -c nv.c -o nvidia.ko\n",
		"kernel-open/nv.c": `static const char info[] __attribute__((section(".modinfo"), used)) =
	"license=Dual MIT/GPL\0version=` + version + `\0name=nvidia\0vermagic=6.1.0-9-test SMP mod_unload \0depends=";
`,
		"firmware/gsp_tu10x.bin": "gsp", "nvidia-smi*": "ELF",
	}
}

func tarOf(t testing.TB, files map[string]string, out io.WriteCloser) {
	t.Helper()
	w := tar.NewWriter(out)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: "./" + strings.TrimSuffix(name, "*"), Mode: 0o644, Size: int64(len(files[name]))}
		if strings.HasSuffix(name, "*") {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), out.Close()); err != nil {
		t.Fatal(err)
	}
}

// xzTo returns a writer that compresses a small archive with xz. For the default dictionary of 8 MiB, the library
// allocates 48 MB, and clears them, for each archive.
func xzTo(t testing.TB, out io.Writer) io.WriteCloser {
	t.Helper()
	w, err := xz.WriterConfig{DictCap: 64 << 10}.NewWriter(out)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// farm is a build farm: two buckets, a signing key, and a repository in a registry.
type farm struct {
	dir, key string
	repo     string
}

func newFarm(t *testing.T) *farm {
	t.Helper()
	installed.Programs(t, "bwrap", "make", "gcc", "strip")
	f := &farm{dir: t.TempDir(), repo: testkit.Registry(t, true) + "/prebake/driver"}
	f.kernel(t, "17800.0.9", headerFiles())
	f.driver(t, driverFiles())
	f.newKey(t)
	return f
}

func (f *farm) newKey(t *testing.T) {
	t.Helper()
	f.key = filepath.Join(t.TempDir(), "key")
	if err := sign.GenerateKey(f.key); err != nil {
		t.Fatal(err)
	}
}

func (f *farm) put(t *testing.T, name string, data []byte) {
	t.Helper()
	path := filepath.Join(f.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// kernel writes a COS build into the bucket.
func (f *farm) kernel(t *testing.T, build string, files map[string]string) {
	t.Helper()
	var tree, tools bytes.Buffer
	tarOf(t, files, gzip.NewWriter(&tree))
	tarOf(t, toolchainFiles(), xzTo(t, &tools))
	for name, data := range map[string][]byte{
		"kernel-headers.tgz": tree.Bytes(), "toolchain.tar.xz": tools.Bytes(),
		"toolchain_env": []byte("CC=x86_64-cros-linux-gnu-gcc\n"), "kernel_commit": []byte(strings.Repeat("0a", 20) + "\n"),
	} {
		f.putChecked(t, "cos/"+build+"/lakitu/"+name, data)
	}
}

// putChecked writes a file and its MD5 checksum into the bucket.
func (f *farm) putChecked(t *testing.T, name string, data []byte) {
	t.Helper()
	f.put(t, name, data)
	f.put(t, name+".md5", fmt.Appendf(nil, "%x", md5.Sum(data)))
}

// driver writes an NVIDIA release into the bucket.
func (f *farm) driver(t *testing.T, files map[string]string) {
	t.Helper()
	f.putEdition(t, version, files)
}

// putEdition writes an NVIDIA release into the bucket. The version may have an edition's suffix, such as -grid.
func (f *farm) putEdition(t *testing.T, version string, files map[string]string) {
	t.Helper()
	run := bytes.NewBufferString("#!/bin/sh\nskip=\"20\"\n" + strings.Repeat(":\n", 18))
	zw, err := zstd.NewWriter(run, zstd.WithWindowSize(128<<10), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	tarOf(t, files, zw)
	name := "NVIDIA-Linux-x86_64-" + version + ".run"
	f.put(t, "drivers/"+name, run.Bytes())
	f.put(t, "drivers/sha256/"+name+".sha256", fmt.Appendf(nil, "%x  %s\n", sha256.Sum256(run.Bytes()), name))
}

func (f *farm) config(t *testing.T, cache *cas.Cache) pipeline.Config {
	return pipeline.Config{
		KernelMirror: "file://" + f.dir + "/cos", DriverMirror: "file://" + f.dir + "/drivers", Cache: cache,
		Destinations: []string{f.repo}, Key: f.key, BuilderID: "https://example.com/builder", Version: "test", Jobs: 1,
		LoadTest: pipeline.LoadTestAuto,
	}
}

func emptyCache(t *testing.T) *cas.Cache {
	t.Helper()
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cache.Close(); err != nil {
			t.Error(err)
		}
	})
	return cache
}

func request(build string) pipeline.Request {
	return pipeline.Request{BuildID: build, Board: "lakitu", Driver: version, Flavour: target.Open}
}

func (f *farm) verifier(t *testing.T) *trust.Verifier {
	t.Helper()
	signer, err := sign.LoadSigner(t.Context(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	v, err := signer.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// build runs the pipeline and also returns its log.
func build(t *testing.T, cfg pipeline.Config, r pipeline.Request) (*pipeline.Result, string, error) {
	t.Helper()
	var log bytes.Buffer
	res, err := pipeline.Run(t.Context(), cfg, r, &log, &timeline.Run{})
	return res, log.String(), err
}

func must(t *testing.T, cfg pipeline.Config, r pipeline.Request) *pipeline.Result {
	t.Helper()
	res, log, err := build(t, cfg, r)
	if err != nil {
		t.Fatalf("Run = %v\n%s", err, log)
	}
	return res
}

func phases(res *pipeline.Result) (names []string) {
	for _, p := range res.Phases {
		if p.Of == "" {
			names = append(names, p.Name)
		}
	}
	return names
}

// checkArtifact checks that a node of this COS build would accept the artifact. attached is the number of statements
// that the artifact must have.
func (f *farm) checkArtifact(t *testing.T, res *pipeline.Result, attached int) {
	t.Helper()
	repo, err := registry.Open(f.repo, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{res.Tag, bundle.KernelTag(res.Kernel, res.Driver)} {
		if d, ok, err := publish.Existing(t.Context(), repo, tag); err != nil || !ok || d != res.Digest {
			t.Errorf("tag %s points at %s, %v; want %s", tag, d, err, res.Digest)
		}
	}
	v := f.verifier(t)
	raw, err := repo.Manifest(t.Context(), res.Digest)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := bundle.ConfigDescriptor(raw)
	if err != nil {
		t.Fatal(err)
	}
	config, err := repo.Small(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	content, err := bundle.ParseManifest(raw, config)
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := repo.Attached(t.Context(), res.Digest, trust.ArtifactTypeBundle)
	if err != nil || len(bundles) != attached {
		t.Errorf("%d statements attached, %v; want %d", len(bundles), err, attached)
	}
	verdict, err := v.Verify(bundles,
		trust.Expect{Digest: res.Digest, Kernel: res.Kernel, Driver: res.Driver, Identity: content.Identity})
	if err != nil {
		t.Fatalf("Verify = %v", err)
	}
	if verdict.LoadTest != trust.VerdictStatic || !strings.HasPrefix(verdict.InvocationID, "urn:uuid:") {
		t.Errorf("Verify = load test %q, invocation %q; want static checks only, and an id", verdict.LoadTest,
			verdict.InvocationID)
	}
	for _, predicate := range []string{trust.PredicateProvenance, trust.PredicateKernelMatch, trust.PredicateTestResult,
		trust.PredicateSBOM} {
		if len(v.Statements(bundles, res.Digest, predicate)) == 0 {
			t.Errorf("no statement of type %s", predicate)
		}
	}
	logs, err := repo.Attached(t.Context(), res.Digest, publish.ArtifactTypeLog)
	if err != nil || len(logs) != 1 {
		t.Fatalf("%d logs attached, %v; want one", len(logs), err)
	}
	if text, err := publish.UnpackLog(logs[0]); err != nil || !strings.Contains(string(text), "== compile\n") {
		t.Errorf("the attached log is %q, %v; want what the build said", text, err)
	}
}

var (
	whole  = []string{"source", "look up", "compile", "check", "load test", "package", "sign", "publish"}
	reused = []string{"source", "look up", "publish"}
)

// TestBuild checks how builds reuse results. The first build compiles. The second takes the modules from the cache.
// Later builds have empty caches and reuse the artifact in the registry.
func TestBuild(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cache := emptyCache(t)
	first := must(t, f.config(t, cache), request("17800.0.9"))
	if diff := cmp.Diff(whole, phases(first)); diff != "" || first.Existed || first.Reused {
		t.Errorf("first build: existed %v, reused %v, phases (-want +got):\n%s", first.Existed, first.Reused, diff)
	}
	f.checkArtifact(t, first, 4)

	elsewhere := f.config(t, cache)
	elsewhere.Destinations = []string{"oci:" + filepath.Join(t.TempDir(), "layout")}
	second := must(t, elsewhere, request("17800.0.9"))
	if second.Digest != first.Digest || second.Existed ||
		!slices.ContainsFunc(second.Phases,
			func(p timeline.Phase) bool { return p.Name == "compile" && strings.Contains(p.Note, "cached") }) {
		t.Errorf("from the cache: %s, existed %v, %+v; want %s, cached", second.Digest, second.Existed, second.Phases,
			first.Digest)
	}

	// If a cell must be compiled again, the note of the compile phase must say which input changed.
	changed := headerFiles()
	changed[headers+"include/linux/new.h"] = "#define NEW\n"
	other := newFarm(t)
	other.kernel(t, "17800.0.9", changed)
	third := must(t, other.config(t, cache), request("17800.0.9"))
	if !slices.ContainsFunc(third.Phases, func(p timeline.Phase) bool {
		return p.Name == "compile" && p.Note == "1 modules, changed: kernel fingerprint"
	}) {
		t.Errorf("with another header the phases are %+v; want the compile to say so", third.Phases)
	}

	// With an empty cache, a build for another COS build with the same kernel must reuse the published artifact.
	twin := headerFiles()
	twin[headers+"include/generated/compile.h"] = "#define LINUX_COMPILE_HOST \"b\"\n"
	f.kernel(t, "17800.1.9", twin)
	for i, id := range []string{"17800.0.9", "17800.1.9"} {
		res := must(t, f.config(t, emptyCache(t)), request(id))
		if diff := cmp.Diff(reused, phases(res)); diff != "" || !res.Existed || !res.Reused || res.Digest != first.Digest ||
			res.Tag != first.Tag {
			t.Errorf("%s: %s, existed %v, reused %v; want %s; phases (-want +got):\n%s", id, res.Digest, res.Existed, res.Reused,
				first.Digest, diff)
		}
		if res.Kernel.BuildID != id || len(res.Layers) != 3 || len(res.Repositories) != 1 {
			t.Errorf("%s: result %+v lacks something", id, res)
		}
		f.checkArtifact(t, res, 4+i)
	}
}

// TestEdition checks an edition of a release. Google's buckets have such editions, for example one for guests of vGPU.
// An edition must be an artifact of its own. Its modules have the version of the plain release.
func TestEdition(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	files := driverFiles()
	files["nvidia-gridd*"] = "ELF"
	f.putEdition(t, version+"-grid", files)
	cfg := f.config(t, emptyCache(t))
	plain := must(t, cfg, request("17800.0.9"))
	r := request("17800.0.9")
	r.Driver = version + "-grid"
	res := must(t, cfg, r)
	if res.Digest == plain.Digest || res.Driver.Version != version+"-grid" ||
		!strings.HasPrefix(res.Tag, version+"-grid-open-") {
		t.Errorf("the edition is %s %s, tag %s; the release %s", res.Digest, res.Driver, res.Tag, plain.Digest)
	}
	f.checkArtifact(t, res, 4)
}

// TestNotReused checks that a published artifact is reused only if a compile would certainly give the same bytes.
func TestNotReused(t *testing.T) {
	t.Parallel()
	rows := []struct {
		name   string
		change func(t *testing.T, f *farm, cfg *pipeline.Config)
		kind   fault.Kind // kind of the build's error; Internal means success
	}{
		{"signed with another key", func(t *testing.T, f *farm, cfg *pipeline.Config) { f.newKey(t); cfg.Key = f.key },
			fault.Internal},
		{"not everywhere", func(t *testing.T, _ *farm, cfg *pipeline.Config) {
			cfg.Destinations = append(cfg.Destinations, "oci:"+filepath.Join(t.TempDir(), "layout"))
		}, fault.Internal},
		{"made from another runfile", func(t *testing.T, f *farm, _ *pipeline.Config) {
			files := driverFiles()
			files["nvidia-smi*"] = "ELF, changed"
			f.driver(t, files)
		}, fault.PublishRefused},
		{"load test demanded", func(_ *testing.T, _ *farm, cfg *pipeline.Config) { cfg.LoadTest = pipeline.LoadTestRequire },
			fault.LoadTestFailed},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			first := must(t, f.config(t, emptyCache(t)), request("17800.0.9"))
			cfg := f.config(t, emptyCache(t))
			row.change(t, f, &cfg)
			res, log, err := build(t, cfg, request("17800.0.9"))
			if row.kind != fault.Internal {
				if !fault.Is(err, row.kind) || res.Reused {
					t.Errorf("Run = %v, reused %v; want %v", err, res.Reused, row.kind)
				}
				return
			}
			if err != nil || res.Reused || res.Digest != first.Digest {
				t.Fatalf("Run = %s, reused %v, %v; want %s made again\n%s", res.Digest, res.Reused, err, first.Digest, log)
			}
		})
	}
}
