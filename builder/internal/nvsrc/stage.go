package nvsrc

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/hostfile"
	"github.com/prebake/prebake/pkg/target"
)

// StageRecipe is the version of the Stage functions. Raise it when they write another layout for the same release.
const StageRecipe = "stage-2"

// These constants are folders of an installation, relative to its root.
const (
	binDir      = "bin"
	libDir      = "lib64"
	vulkanDir   = "vulkan"
	icdDir      = "icd.d"
	layerDir    = "implicit_layer.d"
	eglDir      = "share/glvnd/egl_vendor.d"
	openCLDir   = "share/OpenCL/vendors"
	firmwareDir = "firmware/nvidia"
)

// destinations has the folder for each type of file in the manifest that a compute node needs. X11, VDPAU,
// documentation, unit files and sources are left out. Vulkan's driver file refers to libGLX_nvidia, a GLX_CLIENT_LIB.
var destinations = map[string]string{
	"CUDA_LIB": libDir, "OPENCL_LIB": libDir, "OPENCL_WRAPPER_LIB": libDir, "NVCUVID_LIB": libDir, "ENCODEAPI_LIB": libDir,
	"UTILITY_LIB": libDir, "OPENGL_LIB": libDir, "GLVND_LIB": libDir, "TLS_LIB": libDir, "GLX_CLIENT_LIB": libDir,
	"EGL_CLIENT_LIB": libDir,
	"CUDA_SYMLINK":   libDir, "OPENCL_LIB_SYMLINK": libDir, "OPENCL_WRAPPER_SYMLINK": libDir,
	"NVCUVID_LIB_SYMLINK":   libDir,
	"ENCODEAPI_LIB_SYMLINK": libDir,
	"UTILITY_LIB_SYMLINK":   libDir, "OPENGL_SYMLINK": libDir, "GLVND_SYMLINK": libDir, "GLX_CLIENT_SYMLINK": libDir,
	"EGL_CLIENT_SYMLINK": libDir,
	"UTILITY_BINARY":     binDir, "UTILITY_BIN_SYMLINK": binDir, "NVIDIA_MODPROBE": binDir,
	"VULKAN_ICD_JSON": vulkanDir, "GLVND_EGL_ICD_JSON": eglDir, "CUDA_ICD": openCLDir,
}

// vulkanFolder returns the folder of one of Vulkan's files, by its folder in the manifest. Older manifests have no such
// folder; then the file's name decides.
func vulkanFolder(base, subdir string) string {
	switch {
	case subdir != "":
		return path.Join(vulkanDir, subdir)
	case base == "nvidia_layers.json":
		return path.Join(vulkanDir, layerDir)
	}
	return path.Join(vulkanDir, icdDir)
}

// desktopPrefixes begin the names of libraries for desktop sessions. The types in the manifest do not distinguish them.
var desktopPrefixes = []string{
	"libnvidia-gtk", "libnvidia-wayland-client", "libnvidia-egl-wayland", "libnvidia-egl-xcb", "libnvidia-egl-xlib",
	"libnvidia-fbc", "libvdpau", "libglxserver", "libnvidia-glxserver", "libnvidia-wfb", "libnvidia-vulkan-producer",
}

// tools are the programs of a release that are installed on nodes.
var tools = []string{
	"nvidia-smi", "nvidia-modprobe", "nvidia-persistenced", "nvidia-debugdump", "nvidia-cuda-mps-control",
	"nvidia-cuda-mps-server",
}

// item is one file or link of the layout.
type item struct {
	src  string // relative to the release's folder; "" for a link
	link string // the target of a link; "" for a file
	exec bool
}

// StageUserspace copies the release's user space to an empty folder. The result is the same on every machine.
func (r *Release) StageUserspace(dst string) error {
	layout, err := r.userspace()
	if err == nil {
		err = r.write(dst, layout)
	}
	if err == nil {
		err = addSONAMEs(filepath.Join(dst, libDir))
	}
	if err != nil {
		return fmt.Errorf("stage user space of %s: %w", r.Version, err)
	}
	return nil
}

// StageFirmware copies the GSP firmware into the folder, below dst, in which the kernel's firmware loader looks for it.
// If the release has no firmware, that folder is empty.
func (r *Release) StageFirmware(dst string) error {
	names, err := filepath.Glob(filepath.Join(r.Dir, "firmware", "*.bin"))
	if err != nil {
		return err
	}
	to := path.Join(firmwareDir, target.ModuleVersion(r.Version))
	layout := map[string]item{}
	for _, name := range names {
		layout[path.Join(to, filepath.Base(name))] = item{src: path.Join("firmware", filepath.Base(name))}
	}
	err = os.MkdirAll(filepath.Join(dst, filepath.FromSlash(to)), 0o755)
	if err == nil {
		err = r.write(dst, layout)
	}
	if err != nil {
		return fmt.Errorf("stage firmware of %s: %w", r.Version, err)
	}
	return nil
}

// userspace decides the layout from the manifest, or from file names if there is no manifest.
func (r *Release) userspace() (map[string]item, error) {
	if r.Manifest == nil {
		return r.userspaceByName()
	}
	layout := map[string]item{}
	for _, e := range r.Manifest.Entries {
		to, ok := destinations[e.Type]
		base := path.Base(e.Path)
		if !ok || e.Compat32 || e.NonGLVND || !wanted(to, base) {
			continue
		}
		it := item{src: e.Path, exec: e.Mode&0o111 != 0}
		if e.Target != "" {
			it = item{link: path.Base(e.Target)} // a link and its target are in the same folder
		}
		if to == vulkanDir {
			to = vulkanFolder(base, e.Subdir)
		}
		name := path.Join(to, base)
		if old, ok := layout[name]; ok && old != it {
			return nil, fault.New(fault.Unsupported, fmt.Sprintf("the runfile's .manifest lists two files for %s", name),
				"report this driver version to the developers of Prebake: the runfile's .manifest has an unknown form")
		}
		layout[name] = it
	}
	dropDangling(layout)
	return layout, nil
}

// userspaceByName decides the layout of a release without a usable manifest. It includes the libraries at the top of
// the tree, and known tools and driver files.
func (r *Release) userspaceByName() (map[string]item, error) {
	entries, err := os.ReadDir(r.Dir)
	if err != nil {
		return nil, err
	}
	layout := map[string]item{}
	for _, e := range entries {
		name := e.Name()
		to := ""
		switch {
		case !e.Type().IsRegular():
		case strings.HasPrefix(name, "lib") && strings.Contains(name, ".so."):
			to = libDir
		case slices.Contains(tools, name):
			to = binDir
		case name == "nvidia_icd.json", name == "nvidia_layers.json":
			to = vulkanFolder(name, "")
		case name == "10_nvidia.json":
			to = eglDir
		case name == "nvidia.icd":
			to = openCLDir
		}
		if to != "" && wanted(to, name) {
			layout[path.Join(to, name)] = item{src: name, exec: to == binDir || to == libDir}
		}
	}
	// Programs also open these libraries by their names without a version.
	for _, plain := range []string{"libcuda.so", "libnvidia-ml.so", "libnvcuvid.so", "libnvidia-encode.so"} {
		if _, ok := layout[path.Join(libDir, plain+"."+target.ModuleVersion(r.Version))]; ok {
			layout[path.Join(libDir, plain)] = item{link: plain + ".1"}
		}
	}
	return layout, nil
}

func wanted(to, base string) bool {
	switch to {
	case binDir:
		return slices.Contains(tools, base)
	case libDir:
		return !slices.ContainsFunc(desktopPrefixes, func(prefix string) bool { return strings.HasPrefix(base, prefix) })
	}
	return true
}

// dropDangling removes links to files that were left out of the layout.
func dropDangling(layout map[string]item) {
	for again := true; again; {
		again = false
		for name, it := range layout {
			if it.link == "" {
				continue
			}
			if _, ok := layout[path.Join(path.Dir(name), it.link)]; !ok {
				delete(layout, name)
				again = true
			}
		}
	}
}

// write copies the layout below dst.
func (r *Release) write(dst string, layout map[string]item) error {
	from, err := os.OpenRoot(r.Dir)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenRoot(dst)
	if err != nil {
		return err
	}
	defer to.Close()
	for name, it := range layout {
		if err := to.MkdirAll(path.Dir(name), 0o755); err != nil {
			return fault.CacheDisk(err)
		}
		if it.link != "" {
			err = to.Symlink(it.link, name)
		} else {
			err = copyFile(from, to, name, it)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return fault.Wrap(fault.Unverified,
				fmt.Errorf("the runfile's .manifest lists %s, which the runfile lacks: %w", it.src, err),
				"check that the object is NVIDIA's .run file, whole and unchanged")
		}
		if err != nil {
			return fault.CacheDisk(err)
		}
	}
	return nil
}

func copyFile(from, to *os.Root, name string, it item) error {
	in, err := from.Open(filepath.FromSlash(it.src))
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return fault.New(fault.Unverified, fmt.Sprintf("%s is not a regular file", it.src),
			"check that the object is NVIDIA's .run file, whole and unchanged")
	}
	mode := fs.FileMode(0o644)
	if it.exec {
		mode = 0o755
	}
	out, err := to.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	return errors.Join(out.Chmod(mode), hostfile.Fill(out, in))
}

// addSONAMEs adds a link for each library whose SONAME differs from its file name. The dynamic loader finds a library
// by its SONAME.
func addSONAMEs(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		soname, err := readSONAME(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		if soname == "" || soname == e.Name() {
			continue
		}
		if err := os.Symlink(e.Name(), filepath.Join(dir, soname)); err != nil && !errors.Is(err, fs.ErrExist) {
			return fault.CacheDisk(err)
		}
	}
	return nil
}

// readSONAME returns a library's DT_SONAME, or "" if there is none or the file is not a readable ELF file.
func readSONAME(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	lib, err := elf.NewFile(f)
	if err != nil {
		return "", nil
	}
	defer lib.Close()
	names, err := lib.DynString(elf.DT_SONAME)
	if err != nil || len(names) == 0 {
		return "", nil
	}
	if names[0] != path.Base(names[0]) || names[0] == "." || names[0] == ".." || len(names[0]) > 255 {
		return "", fault.New(fault.Unverified,
			fmt.Sprintf("%s has the SONAME %.80q, which is not a file name", filepath.Base(file), names[0]),
			"check that the object is NVIDIA's .run file, whole and unchanged")
	}
	return names[0], nil
}
