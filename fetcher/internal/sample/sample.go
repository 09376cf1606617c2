// Package sample makes a signed artifact and a node's root folder for tests. The artifact has the real format; its
// driver is a dummy. Only tests import it.
package sample

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit"
	"github.com/prebake/prebake/pkg/trust"
)

// Cell is a kernel and a driver.
type Cell struct {
	Kernel      target.Kernel
	Driver      target.Driver
	Fingerprint target.Fingerprint
	// Vermagic is the vermagic of the modules, or "" for the kernel's.
	Vermagic string
	// Attested are the kernels with a kernel match. nil means only Kernel.
	Attested []target.Kernel
	// Untagged means that the artifact gets no pointer tag.
	Untagged bool
	// PointAt is the kernel whose pointer tag leads to the artifact. The zero value means Kernel.
	PointAt target.Kernel
	// Bulk is the number of bytes that are added to one file of each layer. Half of them compress well.
	Bulk int
	// CUDA adds a file in place of CUDA's library.
	CUDA bool
	// Modify changes the files of the modules layer before they are packed. It may be nil.
	Modify func(files map[string]string)
}

// NewCell returns a cell of a COS build and a driver version.
func NewCell(t testing.TB, buildID, version string) Cell {
	t.Helper()
	k, err := target.ParseKernel(buildID, "lakitu")
	if err != nil {
		t.Fatal(err)
	}
	k.Arch, k.Release, k.Version =
		target.Arch(runtime.GOARCH), "6.1.77+", "#1 SMP PREEMPT_DYNAMIC Sat Feb 10 10:00:00 UTC 2024"
	return Cell{
		Kernel: k, Driver: target.Driver{Version: version, Flavour: target.Open},
		Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("0a", 32)),
	}
}

func (c Cell) vermagic() string {
	if c.Vermagic != "" {
		return c.Vermagic
	}
	return c.Kernel.Release + " SMP preempt mod_unload "
}

// Published is an artifact that was published.
type Published struct {
	Digest   string
	Manifest []byte
	Layers   []bundle.Layer
}

// Publish makes the artifact of a cell, signs it and puts it into a repository.
func Publish(t testing.TB, ref string, key *testkit.Key, c Cell) Published {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	version := c.Driver.Modules().Version
	libs := map[string]string{
		"bin/nvidia-smi": "#!/bin/false\n", "lib64/libnvidia-ml.so." + version: "library " + version,
		"vulkan/icd.d/nvidia_icd.json": "{}", "share/doc/README": "sample",
	}
	mods := map[string]string{}
	for _, name := range []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-peermem"} {
		mods["drivers/"+name+".ko"] = string(Module(name, version, c.vermagic()))
	}
	firmware := map[string]string{"firmware/nvidia/" + version + "/gsp_tu10x.bin": "firmware " + version}
	if c.Bulk > 0 {
		bulk := filler(c.Bulk)
		mods["drivers/nvidia.ko"] += bulk // an ELF file may have any bytes after its sections
		libs["lib64/libcuda.so."+version] = bulk
		firmware["firmware/nvidia/"+version+"/gsp_ga10x.bin"] = bulk
	}
	if c.CUDA {
		libs["lib64/libcuda.so.1"] = "CUDA " + version
	}
	if c.Modify != nil {
		c.Modify(mods)
	}
	var layers []bundle.Layer
	for i, files := range []map[string]string{mods, libs, firmware} {
		kind := bundle.LayerKinds()[i]
		src := filepath.Join(dir, string(kind))
		for name, content := range files {
			Write(t, src, name, content)
		}
		if kind == bundle.LayerUserspace {
			if err := os.Symlink("libnvidia-ml.so."+version, filepath.Join(src, "lib64/libnvidia-ml.so.1")); err != nil {
				t.Fatal(err)
			}
		}
		l, err := bundle.PackLayer(ctx, src, kind, filepath.Join(dir, string(kind)+".tar.zst"))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	img, err := bundle.Image(bundle.Identity{
		Fingerprint: c.Fingerprint, Arch: c.Kernel.Arch, Release: c.Kernel.Release, Vermagic: strings.TrimSpace(c.vermagic()),
		Driver: c.Driver,
	}, layers)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := registry.Open(ref, registry.Options{Plain: true})
	if err != nil {
		t.Fatal(err)
	}
	d, err := repo.Push(ctx, img)
	if err != nil {
		t.Fatal(err)
	}
	Attest(t, repo, key, d, c)
	if !c.Untagged {
		at := c.PointAt
		if at.BuildID == "" {
			at = c.Kernel
		}
		if err := repo.Tag(ctx, d, bundle.KernelTag(at, c.Driver)); err != nil {
			t.Fatal(err)
		}
	}
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	return Published{Digest: d.Digest.String(), Manifest: manifest, Layers: layers}
}

// filler returns n bytes: blocks of 4 KiB, alternately random and zero.
func filler(n int) string {
	noise := rand.NewChaCha8([32]byte{})
	data := make([]byte, n)
	for at := 0; at+4096 <= n; at += 2 * 4096 {
		_, _ = noise.Read(data[at : at+4096]) // ChaCha8 never returns an error
	}
	return string(data)
}

// Attest attaches the signed statements of a cell to an artifact.
func Attest(t testing.TB, repo *registry.Repository, key *testkit.Key, d v1.Descriptor, c Cell) {
	t.Helper()
	digest := d.Digest.String()
	statements := [][]byte{key.Provenance(t, digest,
		trust.Parameters{Kernel: c.Kernel, Fingerprint: c.Fingerprint, Driver: c.Driver})}
	attested := c.Attested
	if attested == nil {
		attested = []target.Kernel{c.Kernel}
	}
	for _, k := range attested {
		statements = append(statements, key.KernelMatch(t, digest, trust.KernelMatch{Kernel: k, Fingerprint: c.Fingerprint}))
	}
	for _, s := range statements {
		if _, err := repo.Attach(context.Background(), d, trust.ArtifactTypeBundle, s, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// Module returns a kernel module without code: an ELF file whose .modinfo section has the arguments.
func Module(name, version, vermagic string) []byte {
	info := []byte("license=Dual MIT/GPL\x00version=" + version + "\x00name=" + strings.ReplaceAll(name, "-",
		"_") + "\x00vermagic=" + vermagic + "\x00depends=\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00.symtab\x00.strtab\x00" + modinfo.BuildIDNote + "\x00")
	const header, section = 64, 64
	symbols := make([]byte, 24) // the mandatory null symbol
	strtab := []byte{0}
	at := uint64(header)
	type sec struct {
		name, kind uint32
		data       []byte
		link       uint32
		entry      uint64
	}
	secs := []sec{{}, {1, 1, info, 0, 0}, {10, 3, names, 0, 0}, {20, 2, symbols, 4, 24}, {28, 3, strtab, 0, 0},
		{36, 7, []byte(BuildNote(name + version)), 0, 0}}
	var body, table bytes.Buffer
	put := func(b *bytes.Buffer, v any) { _ = binary.Write(b, binary.LittleEndian, v) } // writing to a Buffer never fails
	for i, s := range secs {
		offset := at
		if i == 0 {
			offset = 0
		}
		put(&table, s.name)
		put(&table, s.kind)
		put(&table, []uint64{0, 0, offset, uint64(len(s.data))})
		put(&table, []uint32{s.link, 0})
		put(&table, []uint64{1, s.entry})
		body.Write(s.data)
		at += uint64(len(s.data))
	}
	var out bytes.Buffer
	out.Write([]byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	put(&out, []uint16{1, 62}) // relocatable, x86-64
	put(&out, uint32(1))
	put(&out, []uint64{0, 0, at})
	put(&out, uint32(0))
	put(&out, []uint16{header, 0, 0, section, uint16(len(secs)), 2})
	out.Write(body.Bytes())
	out.Write(table.Bytes())
	return out.Bytes()
}

// BuildNote returns an ELF note with a build id that is a hash of the text.
func BuildNote(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "\x04\x00\x00\x00\x20\x00\x00\x00\x03\x00\x00\x00GNU\x00" + string(sum[:])
}

// Root makes the root folder of a node with this kernel and number of GPUs. It returns the path.
func Root(t testing.TB, c Cell, gpus int) string {
	t.Helper()
	root := t.TempDir()
	RootAt(t, root, c, gpus)
	return root
}

// RootAt does the work of [Root] in an existing folder.
func RootAt(t testing.TB, root string, c Cell, gpus int) {
	t.Helper()
	files := map[string]string{
		"etc/os-release": fmt.Sprintf("BUILD_ID=%s\nNAME=\"Container-Optimized "+
			"OS\"\nKERNEL_COMMIT_ID=%s\nVERSION_ID=109\nVERSION=109\nID=cos\n",
			c.Kernel.BuildID, strings.Repeat("c", 40)),
		"etc/lsb-release": "CHROMEOS_RELEASE_BOARD=" + c.Kernel.Board +
			"\nCHROMEOS_RELEASE_TRACK=stable-channel\n",
		"proc/cmdline": "ro loadpin.exclude=kernel-module modules-load=loadpin_trigger " +
			"module.sig_enforce=0 cros_efi\n",
		"proc/sys/kernel/osrelease": c.Kernel.Release + "\n",
		"proc/sys/kernel/version":   c.Kernel.Version + "\n",
		"proc/modules":              "loadpin_trigger 16384 0 - Live 0x0000000000000000\n",
		"proc/devices": "Character devices:\n  1 mem\n195 nvidia\n236 nvidia-uvm\n\nBlock " +
			"devices:\n  8 sd\n",
		"proc/sys/kernel/random/boot_id":            "2f1e6f0e-6f3f-4a52-9a0c-1f9d6f0b7a11\n",
		"sys/module/firmware_class/parameters/path": "/var/lib/nvidia/firmware\n",
		"sys/bus/pci/devices/0000:00:03.0/vendor":   "0x1af4\n",
		"sys/bus/pci/devices/0000:00:03.0/class":    "0x020000\n",
		"dev/null":                                  "",
		"tmp/.keep":                                 "",
		"home/.keep":                                "",
	}
	for i := range gpus {
		dir := fmt.Sprintf("sys/bus/pci/devices/0000:00:%02x.0/", 4+i)
		files[dir+"vendor"], files[dir+"class"], files[dir+"device"] = "0x10de\n", "0x030200\n", "0x1eb8\n"
	}
	for name, content := range files {
		Write(t, root, name, content)
	}
}

// Write writes a file below a folder, and makes missing folders of its path.
func Write(t testing.TB, dir, name, content string) {
	t.Helper()
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
