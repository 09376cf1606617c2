// Package cdi describes the node's GPUs to container runtimes, in the form of the Container
// Device Interface: a pod, or podman, that asks for nvidia.com/gpu=0 gets the device files
// and the driver, without a runtime of NVIDIA's. It refuses to take the place of a
// description that somebody else wrote.
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

// Kind is what containers ask for. NVIDIA's own tools write the same.
const Kind = "nvidia.com/gpu"

// folder is where runtimes look for what is made anew at each boot, and static for what is
// not (CDI's SPEC.md, "CDI JSON Specification").
const (
	folder = "/var/run/cdi"
	static = "/etc/cdi"
	file   = "prebake-nvidia.json"
)

// maxSpec bounds the file of somebody else that is looked at.
const maxSpec = 1 << 20

// inside is where containers have the driver, as GKE's device plugin mounts it.
const inside = "/usr/local/nvidia"

// GPU is one GPU that the driver drives.
type GPU struct {
	// Minor is that of /dev/nvidiaN.
	Minor uint32
	// UUID is NVIDIA's name of it; "" means not known.
	UUID string
}

// GPUs reads what the loaded driver drives, in the order of the PCI bus.
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

// ParseInformation reads /proc/driver/nvidia/gpus/ADDRESS/information. A UUID of a GPU that
// nobody has opened yet has question marks in it.
func ParseInformation(text string) (g GPU, ok bool) {
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "Device Minor":
			n, err := fmt.Sscanf(value, "%d", &g.Minor)
			ok = n == 1 && err == nil && g.Minor < 254 // from there on they are no GPUs
		case "GPU UUID":
			if strings.HasPrefix(value, "GPU-") && !strings.Contains(value, "?") {
				g.UUID = value
			}
		}
	}
	return g, ok
}

// Spec describes GPUs with a driver that is in an install folder. nodes are the names of
// the driver's device files, below /dev.
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
	// The whole folder: the names in it are links into the set in force.
	spec.ContainerEdits.Mounts = []*specs.Mount{{HostPath: installDir, ContainerPath: inside,
		Options: []string{"ro", "nosuid", "nodev", "rbind", "rprivate"}}}
	// Where NVIDIA's runtime is there, too, it adds nothing to such a container.
	spec.ContainerEdits.Env = []string{"NVIDIA_VISIBLE_DEVICES=void"}
	return spec
}

// Write gives the runtimes a description. It reports whether there is another one than
// before. Where somebody else describes GPUs, none is written: two would contradict
// each other.
func Write(node *noderoot.Root, spec *specs.Spec) (changed bool, err error) {
	other, err := others(node)
	if err != nil {
		return false, err
	}
	if other != "" {
		_, err := remove(node)
		return false, err
	}
	raw, err := json.MarshalIndent(spec, "", "  ")
	if err != nil {
		return false, fmt.Errorf("describe GPUs: %w", err)
	}
	raw = append(raw, '\n')
	if have, err := read(node, path.Join(folder, file)); err == nil && bytes.Equal(have, raw) {
		return false, nil
	}
	if err := node.MakeFolder(folder, 0o755); err != nil {
		return false, fmt.Errorf("describe GPUs: %w", err)
	}
	dir, err := node.Folder(folder)
	if err != nil {
		return false, fmt.Errorf("describe GPUs: %w", err)
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	const tmp = ".prebake-nvidia.tmp" // no runtime reads a file that does not end in .json or .yaml
	err = dir.WriteFile(tmp, raw, 0o644)
	if err == nil {
		err = dir.Rename(tmp, file)
	}
	if err != nil {
		return false, fmt.Errorf("describe GPUs: %w", errors.Join(err, dir.RemoveAll(tmp)))
	}
	return true, nil
}

// Remove takes the description away.
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
		return false, fmt.Errorf("remove the description of GPUs: %w", err)
	}
	err = dir.Remove(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err == nil, errors.Join(err, dir.Close())
}

// others returns the file in which somebody else describes GPUs; "" means nobody does.
func others(node *noderoot.Root) (string, error) {
	for _, dir := range []string{static, folder} {
		entries, err := fs.ReadDir(node.FS(), dir[1:])
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("list descriptions of devices: %w", err)
		}
		for _, e := range entries {
			ext := path.Ext(e.Name())
			if dir == folder && e.Name() == file || ext != ".json" && ext != ".yaml" {
				continue
			}
			info, err := fs.Stat(node.FS(), path.Join(dir, e.Name())[1:])
			if err != nil || !info.Mode().IsRegular() { // a pipe would be waited for
				continue
			}
			raw, err := read(node, path.Join(dir, e.Name()))
			var spec struct {
				Kind string `yaml:"kind"`
			}
			// NVIDIA's device plugin has descriptions of kinds of its own there, too. What cannot
			// be read here cannot be read by runtimes, unless it is too long.
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
