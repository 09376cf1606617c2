package mirror

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"sort"
	"strings"
)

// manifest returns the text of .manifest, which tells an installer the type of every file, as in NVIDIA's runfiles.
func manifest(t tree, arch, version string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "NVIDIA Accelerated Graphics Driver for Linux-%s\n%s\n", arch, version)
	out.WriteString("nvidia\nkernel\nnvidia nvidia-uvm nvidia-modeset nvidia-drm nvidia-peermem\n")
	fmt.Fprintf(&out, "NVIDIA Linux %s Kernel Module\nnvidia-installer\n%s\n", arch, arch)
	for _, name := range t.paths() {
		if line := manifestLine(name, t[name]); line != "" {
			out.WriteString(line + "\n")
		}
	}
	return out.String()
}

// libraryTypes maps the stem of a library's name to the types of the library and of its links in the manifest. If
// subdir is true, the lines of the library and its links have a field for the subdirectory.
var libraryTypes = map[string]struct {
	lib, link string
	subdir    bool
}{
	"libcuda":                  {"CUDA_LIB", "CUDA_SYMLINK", true},
	"libnvidia-nvvm":           {"CUDA_LIB", "CUDA_SYMLINK", true},
	"libnvidia-ptxjitcompiler": {"CUDA_LIB", "CUDA_SYMLINK", true},
	"libnvidia-opencl":         {"OPENCL_LIB", "OPENCL_LIB_SYMLINK", true},
	"libnvcuvid":               {"NVCUVID_LIB", "NVCUVID_LIB_SYMLINK", false},
	"libnvidia-encode":         {"ENCODEAPI_LIB", "ENCODEAPI_LIB_SYMLINK", false},
}

func manifestLine(name string, n node) string {
	base := path.Base(name)
	switch {
	case n.dir || n.mode == 0 && n.link == "" && n.data == nil:
		return ""
	case strings.HasPrefix(base, "lib") && strings.Contains(base, ".so"):
		stem, _, _ := strings.Cut(base, ".so")
		kind, ok := libraryTypes[stem]
		if !ok {
			kind.lib, kind.link = "UTILITY_LIB", "UTILITY_LIB_SYMLINK"
		}
		fields := []string{name, "0755", kind.lib, "NATIVE"}
		if n.link != "" {
			fields = []string{name, "0000", kind.link, "NATIVE"}
		}
		if kind.subdir {
			fields = append(fields, "./")
		}
		if n.link != "" {
			fields = append(fields, n.link)
		}
		return strings.Join(fields, " ")
	case strings.HasPrefix(name, "kernel/"):
		return name + " 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:proprietary"
	case strings.HasPrefix(name, "kernel-open/"):
		return name + " 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:open"
	case strings.HasPrefix(name, "firmware/"):
		return name + " 0644 FIRMWARE"
	case name == "nvidia-modprobe":
		return name + " 4755 NVIDIA_MODPROBE bin/"
	case name == "nvidia-installer":
		return name + " 0755 INSTALLER_BINARY"
	case path.Dir(name) == "." && strings.HasPrefix(name, "nvidia-"):
		return name + " 0755 UTILITY_BINARY"
	}
	return name + " 0644 DOCUMENTATION ./"
}

// addLibraryLinks adds a link with the SONAME of every library, and the plain .so link if NVIDIA's archive has one.
func (t tree) addLibraryLinks(version string) error {
	for _, name := range t.paths() {
		if path.Dir(name) != "." || !strings.HasSuffix(name, ".so."+version) {
			continue
		}
		f, err := elf.NewFile(bytes.NewReader(t[name].data))
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		sonames, err := f.DynString(elf.DT_SONAME)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		for _, soname := range sonames {
			if soname == name || path.Base(soname) != soname {
				continue
			}
			t.add(soname, node{link: name})
			switch stem, _, _ := strings.Cut(name, ".so"); stem {
			case "libcuda", "libnvcuvid", "libnvidia-encode", "libnvidia-ml":
				t.add(stem+".so", node{link: soname})
			}
		}
	}
	return nil
}

// gpuRow matches a row in the README's table of supported products: a name, a PCI device id, and maybe the subsystem's
// vendor and device ids.
var gpuRow = regexp.MustCompile(`^ (\S.{0,120}?)\s{2,}([0-9A-F]{4})(?: ([0-9A-F]{4}) ([0-9A-F]{4}))?(?:\s+\S.*)?$`)

// supportedGPUs returns the text of supported-gpus.json, made from appendix A of the README. It returns "" if that
// table is missing. The list has only current products.
func supportedGPUs(readme []byte) string {
	type chip struct {
		DevID       string   `json:"devid"`
		SubDevID    string   `json:"subdevid,omitempty"`
		SubVendorID string   `json:"subvendorid,omitempty"`
		Name        string   `json:"name"`
		Features    []string `json:"features"`
	}
	text := string(readme)
	start := strings.LastIndex(text, "\nAppendix A. Supported NVIDIA GPU Products")
	if start < 0 {
		return ""
	}
	text = text[start:]
	if i := strings.Index(text, "\nBelow are the legacy GPUs"); i >= 0 {
		text = text[:i]
	}
	if i := strings.Index(text, "\nAppendix B."); i >= 0 {
		text = text[:i]
	}
	seen := map[string]chip{}
	for line := range strings.Lines(text) {
		m := gpuRow.FindStringSubmatch(strings.TrimRight(line, "\r\n"))
		if m == nil {
			continue
		}
		c := chip{DevID: "0x" + m[2], Name: m[1], Features: []string{}}
		if m[3] != "" {
			c.SubVendorID, c.SubDevID = "0x"+m[3], "0x"+m[4]
		}
		seen[m[2]+m[3]+m[4]] = c
	}
	if len(seen) == 0 {
		return ""
	}
	keys := make([]string, 0, len(seen))
	for key := range seen {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	chips := make([]chip, 0, len(keys))
	for _, key := range keys {
		chips = append(chips, seen[key])
	}
	out, err := json.MarshalIndent(map[string]any{"chips": chips}, "", "  ")
	if err != nil {
		return ""
	}
	return string(out) + "\n"
}
