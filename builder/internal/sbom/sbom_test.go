package sbom_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"

	"github.com/prebake/prebake/builder/internal/sbom"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
)

func facts(t testing.TB) sbom.Facts {
	t.Helper()
	k := testkit.SampleKernel("47")
	k.Commit = strings.Repeat("c", 40)
	f := sbom.Facts{
		Digest: "sha256:" + strings.Repeat("d", 64), Kernel: k,
		Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("f", 64)),
		Driver:      target.Driver{Version: "535.261.03", Flavour: target.Open}, Modules: map[string]string{},
		Materials: []sign.Material{
			{Name: "kernel-headers.tgz", URI: "gs://cos-tools/17800.0.47/lakitu/kernel-headers.tgz",
				Digest: "sha256:" + strings.Repeat("1", 64)},
			{Name: "toolchain.tar.xz", URI: "https://example.com/toolchain.tar.xz", Digest: "sha256:" + strings.Repeat("2", 64)},
			{Name: "toolchain_env", URI: "file:///mirror/toolchain_env", Digest: "sha256:" + strings.Repeat("3", 64)},
			{Name: "NVIDIA-Linux-x86_64-535.261.03.run", URI: "gs://drivers/x.run", Digest: "sha256:" + strings.Repeat("4", 64)},
		},
	}
	for i, kind := range bundle.LayerKinds() {
		f.Layers = append(f.Layers, bundle.Layer{Kind: kind, Digest: "sha256:" + strings.Repeat(string('5'+rune(i)), 64)})
	}
	for _, name := range []string{"nvidia", "nvidia-uvm.ko", "nvidia-modeset"} {
		path := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(path, []byte("bytes of "+name), 0o600); err != nil {
			t.Fatal(err)
		}
		f.Modules[name] = path
	}
	return f
}

func TestDocument(t *testing.T) {
	t.Parallel()
	f := facts(t)
	raw, err := sbom.JSON(f)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 { // Go walks a map in random order, so one comparison would prove nothing
		if again, err := sbom.JSON(f); err != nil || !bytes.Equal(again, raw) {
			t.Fatalf("JSON = %s, %v; before it was %s", again, err, raw)
		}
	}
	var d spdx.Document
	if err := json.Unmarshal(raw, &d); err != nil {
		t.Fatal(err)
	}
	if d.SPDXVersion != "SPDX-2.3" || d.CreationInfo.Created != "1970-01-01T00:00:00Z" ||
		d.DocumentNamespace != "https://prebake.dev/spdx/"+strings.Repeat("d", 64) {
		t.Errorf("document = %s", raw)
	}
	if len(d.Packages) != 1+len(f.Materials)+len(f.Layers) || len(d.Files) != len(f.Modules) {
		t.Errorf("%d packages and %d files; want artifact, inputs and layers, and one for each module", len(d.Packages),
			len(d.Files))
	}
	var said []string
	for _, r := range d.Relationships {
		said = append(said, string(r.RefA.ElementRefID)+" "+r.Relationship+" "+string(r.RefB.ElementRefID))
	}
	for _, want := range []string{
		"DOCUMENT DESCRIBES Artifact", "Artifact CONTAINS Layer-userspace", "Layer-modules CONTAINS Module-nvidia-uvm.ko",
		"Module-nvidia.ko GENERATED_FROM Input-4-NVIDIA-Linux-x86-64-535.261.03.run",
		"Module-nvidia.ko GENERATED_FROM Input-1-kernel-headers.tgz",
		"Input-2-toolchain.tar.xz BUILD_TOOL_OF Module-nvidia-modeset.ko",
		"Layer-firmware GENERATED_FROM Input-4-NVIDIA-Linux-x86-64-535.261.03.run",
	} {
		if !slices.Contains(said, want) {
			t.Errorf("no relationship %q in %q", want, said)
		}
	}
	for _, want := range []string{strings.Repeat("c", 40), "17800.0.47", "gs://drivers/x.run",
		"LicenseRef-NVIDIA-driver"} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("document without %q: %s", want, raw)
		}
	}
	if strings.Contains(string(raw), "file://") || strings.Contains(string(raw), f.Modules["nvidia"]) {
		t.Errorf("document names files of this machine: %s", raw)
	}
	f.Created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("x", 3600))
	if raw, err := sbom.JSON(f); err != nil || !strings.Contains(string(raw), "2026-01-02T02:04:05Z") {
		t.Errorf("JSON with a time = %s, %v", raw, err)
	}
}

func TestRefuses(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*sbom.Facts){
		"no digest":         func(f *sbom.Facts) { f.Digest = "latest" },
		"no modules":        func(f *sbom.Facts) { f.Modules = nil },
		"module is missing": func(f *sbom.Facts) { f.Modules["nvidia"] = filepath.Join(t.TempDir(), "none") },
		"no runfile":        func(f *sbom.Facts) { f.Materials = f.Materials[:3] },
		"no headers":        func(f *sbom.Facts) { f.Materials = f.Materials[1:] },
		"bad digest":        func(f *sbom.Facts) { f.Materials[1].Digest = "md5:x" },
		"no modules layer":  func(f *sbom.Facts) { f.Layers = f.Layers[1:] },
	} {
		f := facts(t)
		change(&f)
		if raw, err := sbom.JSON(f); err == nil {
			t.Errorf("%s: JSON = %s; want an error", name, raw)
		}
	}
}
