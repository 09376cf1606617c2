package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	spdx "github.com/spdx/tools-golang/json"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// smallRelease is a release of this source tree. The first test that needs the release makes it.
var smallRelease = struct {
	sync.Mutex
	dir, all string
}{}

func TestMain(m *testing.M) {
	code := m.Run()
	if smallRelease.all != "" {
		if err := os.RemoveAll(smallRelease.all); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// folder returns the folder of a release, and whether the release is complete. "make release-test" sets PREBAKE_RELEASE
// to the folder of a complete release. Otherwise the folder is that of smallRelease.
func folder(t *testing.T) (dir string, whole bool) {
	t.Helper()
	if dir := os.Getenv("PREBAKE_RELEASE"); dir != "" {
		return dir, true
	}
	smallRelease.Lock()
	defer smallRelease.Unlock()
	if smallRelease.dir == "" {
		all, err := os.MkdirTemp("", "prebake-release-")
		if err != nil {
			t.Fatal(err)
		}
		smallRelease.all = all
		if err := assemble(t.Context(), smallConfig(t), filepath.Join(all, "release")); err != nil {
			t.Fatal(err)
		}
		smallRelease.dir = filepath.Join(all, "release")
	}
	return smallRelease.dir, false
}

// publicKey returns the public key in the release's folder. These tests may trust the key because they made the
// release. Others must get the key in another way.
func publicKey(t *testing.T, dir string) []byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, signatureDir, "*.pub"))
	if err != nil || len(names) != 1 {
		t.Fatalf("public keys in %s: %v, %v; want one", dir, names, err)
	}
	text, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func program(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	file := filepath.Join(dir, platform(runtime.GOARCH), name)
	out, err := output(t.Context(), "", []string{"HOME=" + t.TempDir()}, file, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestSigned checks the checksums with the command sha256sum, and the signature with verifyRelease.
func TestSigned(t *testing.T) {
	t.Parallel()
	dir, _ := folder(t)
	if out, err := output(t.Context(), dir, nil, "sha256sum", "--check", "--strict", "--quiet", sumsFile); err != nil {
		t.Errorf("sha256sum: %v\n%s", err, out)
	}
	key := publicKey(t, dir)
	if signer, err := verifyRelease(dir, key); err != nil || signer == "" {
		t.Errorf("verifyRelease = %q, %v; want the key's id", signer, err)
	}
	if _, err := verifyRelease(dir, testkit.NewKey(t).PEM(t)); !errors.Is(err, trust.ErrUnknownKey) {
		t.Errorf("verifyRelease with another key = %v; want %v", err, trust.ErrUnknownKey)
	}
}

// TestCosignVerifies verifies the signature with cosign.
func TestCosignVerifies(t *testing.T) {
	t.Parallel()
	cosign, err := exec.LookPath("cosign")
	if err != nil {
		t.Skip("cosign is not on PATH: deploy/tool.sh builds it; make test runs this test with it")
	}
	dir, _ := folder(t)
	public := filepath.Join(t.TempDir(), "key.pub")
	if err := os.WriteFile(public, publicKey(t, dir), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, right := range map[string]bool{
		sumsFile: true, platform(runtime.GOARCH) + "/fetcher": true, "images/server.tar": true, "LICENSE": false,
	} {
		out, err := output(t.Context(), dir, []string{"HOME=" + t.TempDir()}, cosign, "verify-blob-attestation",
			"--key", public, "--insecure-ignore-tlog", "--type", "slsaprovenance1", "--bundle", signatureFile, name)
		if (err == nil) != right {
			t.Errorf("cosign verify-blob-attestation %s = %v; want success %v\n%s", name, err, right, out)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	t.Parallel()
	dir, _ := folder(t)
	key := publicKey(t, dir)
	write := func(name, text string) func(string) error {
		return func(dir string) error {
			path := filepath.Join(dir, name)
			// The copy's files are hard links to the release's files, so writing to one would change the release.
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return os.WriteFile(path, []byte(text), 0o644)
		}
	}
	for name, change := range map[string]func(dir string) error{
		"changed file":      write("NOTES.md", "x"),
		"more files":        write("linux-amd64/extra", "x"),
		"missing file":      func(dir string) error { return os.Remove(filepath.Join(dir, "LICENSE")) },
		"other checksums":   write(sumsFile, strings.Repeat("0", 64)+"  LICENSE\n"),
		"other provenance":  write(provenanceFile, "{}"),
		"no signature":      func(dir string) error { return os.Remove(filepath.Join(dir, signatureFile)) },
		"another signature": write(signatureFile, "{}"),
		"link in its place": func(dir string) error {
			return errors.Join(os.Remove(dir+"/LICENSE"), os.Symlink("/etc/passwd", dir+"/LICENSE"))
		},
		"checksum of nobody": func(dir string) error { return os.Remove(filepath.Join(dir, sumsFile)) },
	} {
		copied := filepath.Join(t.TempDir(), "copy")
		if _, err := output(t.Context(), "", nil, "cp", "-al", dir, copied); err != nil {
			// cp -l fails if the folders are on different file systems.
			if _, err := output(t.Context(), "", nil, "cp", "-a", dir, copied); err != nil {
				t.Fatal(err)
			}
		}
		if err := change(copied); err != nil {
			t.Fatal(err)
		}
		if signer, err := verifyRelease(copied, key); !fault.Is(err, fault.Unverified) {
			t.Errorf("%s: verifyRelease = %q, %v; want %v", name, signer, err, fault.Unverified)
		}
	}
}

// module compiles an ELF file that stands for a kernel module. It has a .modinfo section and no function.
func module(t *testing.T, name, version, vermagic string) string {
	t.Helper()
	dir := t.TempDir()
	source, object := filepath.Join(dir, "module.c"), filepath.Join(dir, "module.ko")
	text := ""
	lines := []string{"license=GPL", "name=" + name, "version=" + version, "vermagic=" + vermagic, "depends="}
	for i, line := range lines {
		const place = `__attribute__((section(".modinfo"), aligned(1), used))`
		text += fmt.Sprintf("const char info%d[] %s = %q;\n", i, place, line)
	}
	if err := os.WriteFile(source, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// The artifact is for amd64 kernels, so the compiler is the one for amd64, whatever machine runs the test.
	_, err := output(t.Context(), "", nil, triples["amd64"]+"-gcc-12", "-c", "-o", object, source)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(object)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// TestInstalls puts a driver into a bundle and installs it, with nothing but the programs of the release.
func TestInstalls(t *testing.T) {
	t.Parallel()
	dir, _ := folder(t)
	work := t.TempDir()
	key := testkit.NewKey(t)
	keys := filepath.Join(work, "keys.pem")
	if err := os.WriteFile(keys, key.PEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	k := testkit.SampleKernel("47")
	k.Commit = testCommit
	d := target.Driver{Version: "535.261.03", Flavour: target.Open}
	published := "oci:" + filepath.Join(work, "published")
	repo, err := registry.Open(published, registry.Options{})
	if err != nil {
		t.Fatal(err)
	}
	testkit.NewSampleOf(t, key, k, d, map[string]string{
		"drivers/nvidia.ko": module(t, "nvidia", d.Version, testkit.Vermagic(k)),
	}).Publish(t, repo)

	packed := filepath.Join(work, "bundle.tar")
	program(t, dir, "builder", "bundle", "create", packed, "--from", published, "--kernel", k.String(),
		"--driver", d.Version, "--flavour", string(d.Flavour), "--public-key", keys)
	root := filepath.Join(work, "node")
	for name, text := range map[string]string{
		"etc/os-release":            "ID=cos\nBUILD_ID=" + k.BuildID + "\nVERSION=109\nKERNEL_COMMIT_ID=" + k.Commit + "\n",
		"etc/lsb-release":           "CHROMEOS_RELEASE_BOARD=" + k.Board + "\n",
		"proc/sys/kernel/osrelease": k.Release + "\n",
		"proc/cmdline":              "root=/dev/dm-0\n",
		"proc/modules":              "",
		"proc/devices":              "",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	program(t, dir, "fetcher", "install", "--registry", "oci-archive:"+packed, "--key", keys, "--host-root", root,
		"--driver", d.Version, "--flavour", string(d.Flavour), "--no-load", "--builder", "never")
	program(t, dir, "fetcher", "verify", "--key", keys, "--host-root", root)
	installed := filepath.Join(root, "home/kubernetes/bin/nvidia/drivers/nvidia.ko")
	if text, err := os.ReadFile(installed); err != nil || !bytes.Contains(text, []byte(k.Release)) {
		t.Errorf("the node has %q, %v; want the module of %s", text, err, k.Release)
	}
	// The output looks like "server v1.2.3 (go1.26)".
	said := strings.Fields(string(program(t, dir, "server", "version")))
	if len(said) < 2 {
		t.Fatalf("server version = %q; want its name and version", said)
	}
	version := said[1]
	notes, err := os.ReadFile(filepath.Join(dir, "NOTES.md"))
	if err != nil || !strings.HasPrefix(string(notes), "# Prebake "+version+"\n") {
		t.Errorf("server version = %s; the notes begin %.60q, %v", version, notes, err)
	}
}

// TestSelectArches checks that the release's fetcher runs on nodes of all architectures of its image.
func TestSelectArches(t *testing.T) {
	t.Parallel()
	base, err := os.ReadFile("../../deploy/kubernetes/base/fetcher.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, n := selectArches(base, []string{"amd64", "arm64"})
	const want = "- {key: kubernetes.io/arch, operator: In, values: [amd64, arm64]}\n"
	if n != 2 || bytes.Count(got, []byte(want)) != 2 {
		t.Errorf("selectArches = %s, %d; want 2 times %q", got, n, want)
	}
}

// TestManifestsNameTheImages checks that the rendered Kubernetes manifests name the release's images by digest.
func TestManifestsNameTheImages(t *testing.T) {
	t.Parallel()
	dir, whole := folder(t)
	digests := map[string]string{}
	want := []string{runtime.GOARCH}
	if whole {
		want = []string{"amd64", "arm64"}
	}
	for _, im := range images {
		archive := "oci-archive:" + filepath.Join(dir, "images", im.name+".tar")
		raw, err := output(t.Context(), "", nil, "skopeo", "inspect", "--raw", archive)
		if err != nil {
			t.Fatal(err)
		}
		digests[im.name] = imageHost + im.name + "@" + digestOf(raw)
		var index v1.IndexManifest
		if err := json.Unmarshal(raw, &index); err != nil {
			t.Fatal(err)
		}
		var arches []string
		for _, m := range index.Manifests {
			arches = append(arches, m.Platform.Architecture)
			inspectImage(t, im, dir, archive, m.Platform.Architecture, whole)
		}
		if diff := cmp.Diff(want, arches); diff != "" {
			t.Errorf("architectures of image %s (-want +got):\n%s", im.name, diff)
		}
	}
	tools, err := output(t.Context(), "", nil, "../../deploy/kubernetes.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, overlay := range []string{"gke", "plain"} {
		kubectl := filepath.Join(string(bytes.TrimSpace(tools)), "kubectl")
		rendered, err := output(t.Context(), "", nil, kubectl, "kustomize",
			filepath.Join(dir, "manifests/kubernetes/overlays", overlay))
		if err != nil {
			t.Fatal(err)
		}
		selector := "key: kubernetes.io/arch operator: In values: - " + strings.Join(want, " - ") + " - key:"
		if got := strings.Count(strings.Join(strings.Fields(string(rendered)), " "), selector); got != 2 {
			t.Errorf("overlay %s selects nodes %d times with %s; want 2 times:\n%s", overlay, got, selector, rendered)
		}
		for name, want := range digests {
			if !strings.Contains(string(rendered), "image: "+want+"\n") {
				t.Errorf("overlay %s does not have image %s by its digest: want %s", overlay, name, want)
			}
		}
		if strings.Contains(string(rendered), imageHost+"fetcher:") {
			t.Errorf("overlay %s has image fetcher by its tag; want its digest:\n%s", overlay, rendered)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "manifests/gce/cloud-init.yaml"))
	if err != nil || !strings.Contains(string(text), digests["fetcher"]) {
		t.Errorf("cloud-init.yaml does not have image %s, %v", digests["fetcher"], err)
	}
}

// inspectImage checks one architecture of an image: its settings against im, and its programs against those in the
// release's folder. In a complete release, it also runs commands in the builder's image.
func inspectImage(t *testing.T, im image, dir, archive, arch string, whole bool) {
	t.Helper()
	to := filepath.Join(t.TempDir(), im.name+arch)
	_, err := output(t.Context(), "", nil, "skopeo", "--override-arch", arch, "copy", "--quiet", archive, "dir:"+to)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(to, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	var config v1.ConfigFile
	text, err := os.ReadFile(filepath.Join(to, m.Config.Digest.Hex))
	if err == nil {
		err = json.Unmarshal(text, &config)
	}
	if err != nil {
		t.Fatal(err)
	}
	entry := []string{"/usr/local/bin/" + im.name}
	if config.Architecture != arch || config.Config.User != im.user || !cmp.Equal(config.Config.Entrypoint, entry) {
		t.Errorf("image %s for %s = %+v; want user %q and entry point %q", im.name, arch, config, im.user, entry)
	}
	last := filepath.Join(to, m.Layers[len(m.Layers)-1].Digest.Hex)
	for _, name := range im.programs {
		inside, err := output(t.Context(), "", nil, "tar", "--gzip", "--extract", "--to-stdout", "--file", last,
			"usr/local/bin/"+name)
		if err != nil {
			t.Fatal(err)
		}
		outside, _, err := fileSum(filepath.Join(dir, platform(arch), name))
		if err != nil || digestOf(inside) != "sha256:"+outside {
			t.Errorf("image %s for %s: program %s differs from the one in the release's folder, %v", im.name, arch, name, err)
		}
	}
	if whole && im.debian && arch == runtime.GOARCH {
		checkStarts(t, to, m.Layers)
	}
	if im.name == "fetcher" {
		checkSize(t, to, m.Layers)
	}
}

// checkSize checks the size of the fetcher's unpacked image. Each node fetches the image before it has a driver. The
// same bound is in deploy/images.sh.
func checkSize(t *testing.T, dir string, layers []v1.Descriptor) {
	t.Helper()
	const bound = 30_000_000
	size := int64(0)
	for _, l := range layers {
		raw, err := os.ReadFile(filepath.Join(dir, l.Digest.Hex))
		if err != nil {
			t.Fatal(err)
		}
		unpacked, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, unpacked)
		if err != nil {
			t.Fatal(err)
		}
		size += n
	}
	t.Logf("the fetcher's image has %d bytes unpacked", size)
	if size >= bound {
		t.Errorf("the fetcher's image has %d bytes unpacked; want less than %d", size, bound)
	}
}

// TestContents reads the SPDX documents with the Go library of the SPDX project.
func TestContents(t *testing.T) {
	t.Parallel()
	dir, _ := folder(t)
	documents, err := filepath.Glob(filepath.Join(dir, "contents/*.spdx.json"))
	if err != nil || len(documents) < len(programs)+len(images) {
		t.Fatalf("documents: %v, %v; want one for each program and image", documents, err)
	}
	for _, file := range documents {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		d, err := spdx.Read(f)
		f.Close()
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		purls := map[string]bool{}
		for _, p := range d.Packages {
			for _, r := range p.PackageExternalReferences {
				purl, _, _ := strings.Cut(r.Locator, "@")
				purls[purl] = true
			}
		}
		want := []string{"pkg:golang/stdlib"}
		if strings.Contains(file, "image-") {
			want = append(want, "pkg:deb/debian/ca-certificates")
		}
		if strings.Contains(file, "image-builder") {
			want = append(want, "pkg:deb/debian/mawk", "pkg:golang/github.com/sigstore/sigstore-go")
		}
		for _, one := range want {
			if !purls[one] {
				t.Errorf("%s lists no %s", file, one)
			}
		}
	}
}

// TestImagesTwice makes images of the same programs and packages twice, in different folders. Both must be equal byte
// for byte.
func TestImagesTwice(t *testing.T) {
	t.Parallel()
	dir, _ := folder(t)
	c := smallConfig(t)
	packages, err := readLock(c.lock)
	if err == nil {
		err = c.fetch(t.Context(), packages)
	}
	if err != nil {
		t.Fatal(err)
	}
	var before []byte
	for range 2 {
		out := t.TempDir()
		own := platform(runtime.GOARCH)
		if err := os.Symlink(filepath.Join(dir, own), filepath.Join(out, own)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.buildImages(t.Context(), out, t.TempDir(), packages); err != nil {
			t.Fatal(err)
		}
		var all []byte
		for _, im := range images {
			sum, _, err := fileSum(filepath.Join(out, "images", im.name+".tar"))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, sum...)
		}
		if before != nil && !bytes.Equal(all, before) {
			t.Errorf("the archives of the images have sums %s; before they had %s", all, before)
		}
		before = all
	}
}
