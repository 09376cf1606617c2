package loadtest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

func TestChoose(t *testing.T) {
	t.Parallel()
	all := map[string]string{"nvidia": "nvidia", "nvidia-uvm": "uvm", "nvidia-modeset": "modeset", "nvidia-drm": "drm",
		"nvidia-peermem": "peermem", "nvidia-vgpu": "vgpu"}
	needs := map[string][]string{"uvm": {"nvidia"}, "modeset": {"nvidia"},
		"drm": {"nvidia_modeset", "drm_kms_helper", "drm"}}
	for _, row := range []struct {
		name    string
		present map[string]bool
		order   []string
		skipped map[string]string
	}{
		{"kernel without DRM", nil, []string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-peermem"},
			map[string]string{"nvidia-drm": "needs drm-kms-helper, which the machine does not have; drm, which the machine " +
				"does not have", "nvidia-vgpu": "is not among the modules that nodes load"}},
		{"kernel without ACPI's video", map[string]bool{"no-video": true}, []string{"nvidia", "nvidia-uvm", "nvidia-peermem"},
			map[string]string{
				"nvidia-modeset": "needs video, which the machine does not have",
				"nvidia-drm": "needs nvidia-modeset, which needs video, which the machine does not have; drm-kms-helper, " +
					"which the machine does not have; drm, which the machine does not have",
				"nvidia-vgpu": "is not among the modules that nodes load",
			}},
		{"kernel with DRM", map[string]bool{"drm": true, "drm-kms-helper": true},
			[]string{"nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem"},
			map[string]string{"nvidia-vgpu": "is not among the modules that nodes load"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			depends := func(file string) ([]string, error) {
				if file == "modeset" && row.present["no-video"] {
					return []string{"nvidia", "video"}, nil
				}
				return needs[file], nil
			}
			order, skipped, err := choose(all, row.present, depends)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(row.order, order); diff != "" {
				t.Errorf("order (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(row.skipped, skipped); diff != "" {
				t.Errorf("skipped (-want +got):\n%s", diff)
			}
		})
	}
}

func TestChooseRefuses(t *testing.T) {
	t.Parallel()
	modules := map[string]string{"nvidia": "nvidia.ko"}
	_, _, err := choose(modules, nil, func(string) ([]string, error) { return []string{"video"}, nil })
	if !fault.Is(err, fault.InputMissing) || fault.Hint(err) == "" || !errors.Is(err, ErrLacking) {
		t.Errorf("choose() = %v; want input-missing with a hint", err)
	}
	broken := errors.New("no ELF file")
	if _, _, err := choose(modules, nil, func(string) ([]string, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("choose() = %v; want %v", err, broken)
	}
}

func TestKernelModules(t *testing.T) {
	t.Parallel()
	boot := t.TempDir()
	got, err := kernelModules(boot)
	if err != nil || len(got) != 0 {
		t.Errorf("kernelModules() of an empty folder = %v, %v", got, err)
	}
	if err := os.Mkdir(filepath.Join(boot, "modules"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(boot, filepath.FromSlash(vm.BootOrder)), []byte("drm.ko\ndrm_kms_helper.ko\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	got, err = kernelModules(boot)
	if diff := cmp.Diff(map[string]bool{"drm": true, "drm-kms-helper": true}, got); diff != "" || err != nil {
		t.Errorf("kernelModules() = %v, %v", got, err)
	}
}

// TestPlanWantsNVML checks that a runfile without NVML is refused, because a node asks NVML whether the driver works.
func TestPlanWantsNVML(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	err = (&plan{version: "1.2.3", arch: target.AMD64}).addFiles(Config{Userspace: dir, Probe: self})
	if !fault.Is(err, fault.InputMissing) || fault.Hint(err) == "" || strings.Contains(err.Error(), dir) {
		t.Errorf("addFiles = %v (hint %q); want %v without a path of the cache", err, fault.Hint(err), fault.InputMissing)
	}
}

func TestRunRefusesWhatIsMissing(t *testing.T) {
	t.Parallel()
	if _, err := Run(t.Context(), Config{}, nil); !fault.Is(err, fault.Usage) {
		t.Errorf("Run() = %v; want usage", err)
	}
}
