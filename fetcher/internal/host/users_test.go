package host_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/host"
)

// TestDeviceUsers finds the pod of a process by its control group. The names of the groups are as kubelet's two cgroup
// drivers make them (source: Kubernetes' documentation of the cgroup drivers).
func TestDeviceUsers(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	write := func(name, text string) {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	process := func(pid, comm, group string, open ...string) {
		write("proc/"+pid+"/comm", comm+"\n")
		write("proc/"+pid+"/cgroup", group+"\n")
		if err := os.MkdirAll(filepath.Join(root, "proc", pid, "fd"), 0o755); err != nil {
			t.Fatal(err)
		}
		for i, to := range open {
			if err := os.Symlink(to, filepath.Join(root, "proc", pid, "fd", string(rune('0'+i)))); err != nil {
				t.Fatal(err)
			}
		}
	}
	process("1", "systemd", "0::/init.scope", "/dev/null", "socket:[1]")
	process("70", "nvidia-persiste", "0::/system.slice/nvidia.service", "/dev/nvidiactl")
	process("812", "python3",
		"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1b4f2a63_7d1c_4b0e_9a53_0d7f6b1c2e3f.slice/cri-containerd-0a.scope",
		"/dev/nvidia0", "/dev/nvidia0", "/dev/nvidia-uvm", "/dev/nvidiactl")
	process("900", "trainer", "0::/kubepods/besteffort/podaaaaaaaa-7d1c-4b0e-9a53-0d7f6b1c2e3f/0b", "/dev/nvidia1")
	write("proc/cpuinfo", "")
	write("var/log/pods/ml_train-0_1b4f2a63-7d1c-4b0e-9a53-0d7f6b1c2e3f/train/0.log", "")
	want := []host.User{
		{PID: 70, Command: "nvidia-persiste", Devices: []string{"/dev/nvidiactl"}},
		{PID: 812, Command: "python3", Pod: "ml/train-0",
			Devices: []string{"/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidiactl"}},
		{PID: 900, Command: "trainer", Pod: "aaaaaaaa-7d1c-4b0e-9a53-0d7f6b1c2e3f", Devices: []string{"/dev/nvidia1"}},
	}
	for name, fsys := range map[string]func() (got []host.User, err error){
		"a folder": func() ([]host.User, error) { return host.DeviceUsers(os.DirFS(root)) },
		"a root": func() ([]host.User, error) {
			r, err := os.OpenRoot(root)
			if err != nil {
				return nil, err
			}
			defer r.Close()
			return host.DeviceUsers(r.FS())
		},
	} {
		got, err := fsys()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if text := want[1].String(); text != "python3 (pid 812, pod ml/train-0)" {
		t.Errorf("String = %q", text)
	}
	// Reading the real processes of this machine must not fail.
	if got, err := host.DeviceUsers(os.DirFS("/")); err != nil {
		t.Errorf("of this machine: %v, %v", got, err)
	}
}
