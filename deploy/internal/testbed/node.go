package testbed

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// Node is a virtual machine that looks like a COS node with one COS build.
type Node struct {
	Kernel target.Kernel
	// Boot is the folder that has the kernel to boot; see [Scene.Boot].
	Boot string
	// GPU adds the emulated GPU to the machine.
	GPU bool
	// Offline gives the machine no network.
	Offline bool
	// Key is the public key that the node trusts.
	Key     string
	Console io.Writer
	// Files are additional files of the node. Tools are paths of programs on this machine; the node gets copies at the
	// same paths.
	Files []vm.File
	Tools []string
	// Disk is the path of an image that the node has as /dev/vda; "" means none.
	Disk string
	// KernelArgs are added to the kernel's command line.
	KernelArgs []string
	// CountInstructions makes the node's clock independent of the emulator's speed; see [vm.Config].
	CountInstructions bool
	// Timeout is the longest run of the machine; 0 means 10 minutes.
	Timeout time.Duration
}

// InstallDir is the install folder of the node's driver. GKE uses the same folder.
const InstallDir = "/home/kubernetes/bin/nvidia"

// nodeFiles returns the files of a root file system like COS's, with the fetcher.
func (s *Scene) nodeFiles(n Node) ([]vm.File, error) {
	key, err := os.ReadFile(n.Key)
	if err != nil {
		return nil, err
	}
	number := strings.Split(n.Kernel.BuildID, ".")
	files := []vm.File{
		{Name: "/etc/os-release", Mode: 0o644, Data: []byte(fmt.Sprintf(
			"BUILD_ID=%s\nNAME=\"Container-Optimized "+
				"OS\"\nKERNEL_COMMIT_ID=%s\nGOOGLE_CRASH_ID=Lakitu\nVERSION_ID=%d\nVERSION=%d\nPRETTY_NAME=\"Container-Optimized "+
				"OS from Google\"\nID=cos\n",
			n.Kernel.BuildID,
			n.Kernel.Commit,
			n.Kernel.Milestone,
			n.Kernel.Milestone,
		))},
		{Name: "/etc/lsb-release", Mode: 0o644, Data: []byte(fmt.Sprintf(
			"CHROMEOS_RELEASE_BOARD=%s\nCHROMEOS_RELEASE_TRACK=stable-channel\nCHROMEOS_RELEASE_VERSION=%s\nCHROMEOS_RELEASE_BUILD_NUMBER=%s\nCHROMEOS_RELEASE_CHROME_MILESTONE=%d\nDEVICETYPE=OTHER\n",
			n.Kernel.Board,
			n.Kernel.BuildID,
			number[0],
			n.Kernel.Milestone,
		))},
		{Name: "/etc/prebake/keys.pem", Mode: 0o644, Data: key},
		{Name: "/usr/bin/fetcher", Mode: 0o755, Path: s.Program("fetcher")},
		{Name: "/usr/bin/nvmlprobe", Mode: 0o755, Path: s.Program("nvmlprobe")},
	}
	for _, tool := range n.Tools {
		files = append(files, vm.File{Name: tool, Path: tool, Mode: 0o755})
	}
	libs, err := vm.GlibcFiles(append([]string{s.Program("nvmlprobe")}, n.Tools...)...)
	if err != nil {
		return nil, err
	}
	return append(append(files, libs...), n.Files...), nil
}

// Boot unpacks the mirror's files for booting the kernel of a COS build, and returns their folder. It may be called
// concurrently.
func (s *Scene) Boot(ctx context.Context, m *Mirror, k target.Kernel) (string, error) {
	dir := filepath.Join(s.Dir, "boot", k.BuildID)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	unpacked, err := os.MkdirTemp(s.Dir, "boot-")
	if err != nil {
		return "", err
	}
	file := filepath.Join(m.Dir, "cos", k.BuildID, k.Board, "prebake-boot.tgz")
	if _, err := archive.UnpackFile(ctx, file, unpacked, archive.Options{}); err != nil {
		return "", fmt.Errorf("unpack boot files: %w", err)
	}
	// If two callers unpack at the same time, the folder of the first one to end stays.
	if err := os.Rename(unpacked, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return dir, nil
}

// RunNode boots the node, runs the steps, and shuts the node down.
func (s *Scene) RunNode(ctx context.Context, n Node, steps []vm.Step) (*vm.Result, error) {
	files, err := s.nodeFiles(n)
	if err != nil {
		return nil, err
	}
	return vm.Run(ctx, vm.Config{
		Boot: n.Boot, GPU: n.GPU, Init: s.Program("guestinit"), Files: files, Steps: steps,
		Disk: n.Disk, KernelArgs: n.KernelArgs, Network: !n.Offline, MemoryMiB: 4096, Console: n.Console,
		CountInstructions: n.CountInstructions, Timeout: cmp.Or(n.Timeout, 10*time.Minute),
	})
}

// InstallStep returns the step in which the node installs a driver. extra are additional flags of `fetcher install`.
func InstallStep(srv *Server, extra ...string) vm.Step {
	return vm.Step{Name: "install", KeepGoing: true, Timeout: 8 * time.Minute, Argv: append([]string{
		"/usr/bin/fetcher", "install", "--server", "http://10.0.2.2:" + srv.Addr[strings.LastIndex(srv.Addr, ":")+1:],
		"--install-dir", InstallDir, "--output", "json",
	}, extra...)}
}

// ModulesStep returns the step that lists the modules in the node's kernel.
func ModulesStep() vm.Step {
	return vm.Step{Name: "modules", Argv: []string{"@cat", "/proc/modules"}, KeepGoing: true}
}

// StepNamed returns the result of a step.
func StepNamed(res *vm.Result, name string) (vm.StepResult, error) {
	for _, step := range res.Steps {
		if step.Name == name {
			return step, nil
		}
	}
	return vm.StepResult{}, fmt.Errorf("the node did not run step %q", name)
}

// Decode decodes the JSON output of a step.
func Decode(step vm.StepResult, v any) error {
	if err := json.Unmarshal(step.Stdout, v); err != nil {
		return fmt.Errorf("step %q printed no JSON (exit status %d, stderr %q): %w", step.Name, step.ExitCode, step.Stderr,
			err)
	}
	return nil
}

// NodeRoot makes a folder that looks like the root of a COS node, for tests that do not boot the node.
func NodeRoot(root string, k target.Kernel) error {
	for name, text := range map[string]string{
		"etc/os-release":            "ID=cos\nBUILD_ID=" + k.BuildID + "\nVERSION=109\nKERNEL_COMMIT_ID=" + k.Commit + "\n",
		"etc/lsb-release":           "CHROMEOS_RELEASE_BOARD=" + k.Board + "\n",
		"proc/sys/kernel/osrelease": k.Release + "\n",
		"proc/cmdline":              "root=/dev/dm-0 cros_efi\n",
		"proc/modules":              "",
		"proc/devices":              "",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
