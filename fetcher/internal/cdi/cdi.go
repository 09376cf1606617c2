// Package cdi describes the node's GPUs to container runtimes in the format of the Container Device Interface (CDI). A
// container that asks for nvidia.com/gpu=0 gets device files and driver without NVIDIA's container runtime. The package
// never replaces a description of another program.
package cdi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	specs "tags.cncf.io/container-device-interface/specs-go"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
)

// Kind is the device name that containers ask for. NVIDIA's tools use the same name.
const Kind = "nvidia.com/gpu"

// folder has the descriptions that are written at each boot; staticFolder has permanent ones (CDI's SPEC.md, "CDI JSON
// Specification").
const (
	folder       = "/var/run/cdi"
	staticFolder = "/etc/cdi"
	file         = "prebake-nvidia.json"
)

// maxSpec is the maximum number of bytes to read of another program's description.
const maxSpec = 1 << 20

// containerFolder is the driver's path in containers, the same as with GKE's device plugin.
const containerFolder = "/usr/local/nvidia"

// GPU is one GPU that the driver drives.
type GPU struct {
	// Minor is N of /dev/nvidiaN.
	Minor uint32
	// UUID is NVIDIA's identifier of the GPU, or "" if it is not known.
	UUID string
}

// GPUs returns the GPUs of the loaded driver in the order of the PCI bus, or none if no driver is loaded.
func GPUs(root fs.FS) ([]GPU, error) {
	const dir = "proc/driver/nvidia/gpus"
	entries, err := fs.ReadDir(root, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list GPUs of the driver: %w", err)
	}
	var gpus []GPU
	for _, e := range entries {
		raw, err := fs.ReadFile(root, path.Join(dir, e.Name(), "information"))
		if err != nil {
			return nil, fmt.Errorf("read GPU %s: %w", e.Name(), err)
		}
		if g, ok := ParseInformation(string(raw)); ok {
			gpus = append(gpus, g)
		}
	}
	return gpus, nil
}

// ParseInformation parses /proc/driver/nvidia/gpus/ADDRESS/information. The UUID has question marks until a program
// opens the GPU.
func ParseInformation(text string) (g GPU, ok bool) {
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "Device Minor":
			n, err := fmt.Sscanf(value, "%d", &g.Minor)
			ok = n == 1 && err == nil && g.Minor < 254 // minors from 254 on are not GPUs
		case "GPU UUID":
			if strings.HasPrefix(value, "GPU-") && !strings.Contains(value, "?") {
				g.UUID = value
			}
		}
	}
	return g, ok
}

// Spec returns the description of these GPUs. installDir is the folder with the driver, and nodes are the driver's
// device files below /dev.
func Spec(gpus []GPU, installDir string, nodes []string) *specs.Spec {
	spec := &specs.Spec{Version: "0.5.0", Kind: Kind}
	edit := func(minors ...uint32) specs.ContainerEdits {
		var e specs.ContainerEdits
		for _, minor := range minors {
			e.DeviceNodes = append(e.DeviceNodes, &specs.DeviceNode{Path: fmt.Sprintf("/dev/nvidia%d", minor)})
		}
		return e
	}
	var all []uint32
	for i, g := range gpus {
		spec.Devices = append(spec.Devices, specs.Device{Name: fmt.Sprint(i), ContainerEdits: edit(g.Minor)})
		if g.UUID != "" {
			spec.Devices = append(spec.Devices, specs.Device{Name: g.UUID, ContainerEdits: edit(g.Minor)})
		}
		all = append(all, g.Minor)
	}
	spec.Devices = append(spec.Devices, specs.Device{Name: "all", ContainerEdits: edit(all...)})
	for _, name := range []string{"nvidiactl", "nvidia-modeset", "nvidia-uvm-tools", "nvidia-uvm"} {
		if slices.Contains(nodes, name) {
			spec.ContainerEdits.DeviceNodes = append(spec.ContainerEdits.DeviceNodes, &specs.DeviceNode{Path: "/dev/" + name})
		}
	}
	// Mount the whole folder, because bin and lib64 are links to files elsewhere in it.
	spec.ContainerEdits.Mounts = []*specs.Mount{{HostPath: installDir, ContainerPath: containerFolder,
		Options: []string{"ro", "nosuid", "nodev", "rbind", "rprivate"}}}
	// This value stops NVIDIA's container runtime from adding devices to the container.
	spec.ContainerEdits.Env = []string{"NVIDIA_VISIBLE_DEVICES=void"}
	return spec
}

// Write writes the description and reports whether it changed. If another program describes GPUs, Write removes its own
// description, because the two would conflict.
func Write(node *noderoot.Root, spec *specs.Spec) (changed bool, err error) {
	other, err := otherDescription(node)
	if err != nil {
		return false, err
	}
	if other != "" {
		_, err := remove(node)
		return false, err
	}
	raw, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return false, fmt.Errorf("write the CDI description of the GPUs: %w", err)
	}
	raw = append(raw, '\n')
	if have, err := read(node, path.Join(folder, file)); err == nil && bytes.Equal(have, raw) {
		return false, nil
	}
	if err := node.MakeFolder(folder, 0o755); err != nil {
		return false, fmt.Errorf("write the CDI description of the GPUs: %w", err)
	}
	dir, err := node.Folder(folder)
	if err != nil {
		return false, fmt.Errorf("write the CDI description of the GPUs: %w", err)
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	// Runtimes read only .json and .yaml files.
	if err := noderoot.Replace(dir, file, ".prebake-nvidia.tmp", raw); err != nil {
		return false, fmt.Errorf("write the CDI description of the GPUs: %w", err)
	}
	return true, nil
}

// Remove removes the description.
func Remove(node *noderoot.Root) error {
	_, err := remove(node)
	return err
}

func remove(node *noderoot.Root) (bool, error) {
	dir, err := node.Folder(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("remove the CDI description of the GPUs: %w", err)
	}
	err = dir.Remove(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err == nil, errors.Join(err, dir.Close())
}

// otherDescription returns the file in which another program describes GPUs, or "".
func otherDescription(node *noderoot.Root) (string, error) {
	for _, dir := range []string{staticFolder, folder} {
		entries, err := fs.ReadDir(node.FS(), dir[1:])
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("list the CDI descriptions of devices: %w", err)
		}
		for _, e := range entries {
			ext := path.Ext(e.Name())
			if dir == folder && e.Name() == file || ext != ".json" && ext != ".yaml" {
				continue
			}
			info, err := fs.Stat(node.FS(), path.Join(dir, e.Name())[1:])
			if err != nil || !info.Mode().IsRegular() { // reading a pipe would block
				continue
			}
			raw, err := read(node, path.Join(dir, e.Name()))
			var spec struct {
				Kind string `yaml:"kind"`
			}
			// NVIDIA's device plugin writes other kinds here, so compare the kind. The text of a file above maxSpec is cut, so
			// search it instead of parsing it. Ignore a file that does not parse, because runtimes cannot use it.
			if err == nil && (len(raw) >= maxSpec && bytes.Contains(raw, []byte(Kind)) || yaml.Unmarshal(raw, &spec) == nil &&
				spec.Kind == Kind) {
				return path.Join(dir, e.Name()), nil
			}
		}
	}
	return "", nil
}

func read(node *noderoot.Root, name string) ([]byte, error) {
	f, err := node.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxSpec))
}
