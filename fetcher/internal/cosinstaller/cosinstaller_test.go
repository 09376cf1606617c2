package cosinstaller_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/fetcher/internal/cosinstaller"
	"github.com/prebake/prebake/pkg/fault"
)

func TestTranslate(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		line string
		env  map[string]string
		want string
		note string
	}{
		// Source: GoogleCloudPlatform/container-engine-accelerators, nvidia-driver-installer/cos.
		"daemonset-preloaded.yaml": {
			"install", map[string]string{"NVIDIA_INSTALL_DIR_HOST": "/home/kubernetes/bin/nvidia", "ROOT_MOUNT_DIR": "/root"},
			"install --host-root=/root --install-dir=/home/kubernetes/bin/nvidia", "",
		},
		"daemonset-preloaded-latest.yaml": {
			"install --version=latest", map[string]string{"NVIDIA_INSTALL_DIR_HOST": "/home/kubernetes/bin/nvidia"},
			"install --host-root=/root --install-dir=/home/kubernetes/bin/nvidia --driver=latest", "",
		},
		// Source: google/go-tpm-tools, launcher/internal/gpu/driverinstaller.go.
		"Confidential Space": {
			"install -version=595.58.03 -host-dir=/var/lib/nvidia --no-verify", nil,
			"install --host-root=/root --install-dir=/var/lib/nvidia --driver=595.58.03 --no-load", "",
		},
		// Source: cos.googlesource.com/cos/tools, README of the installer.
		"README": {"install -host-dir=/var/lib/nvidia", nil, "install --host-root=/root --install-dir=/var/lib/nvidia", ""},
		"a branch, parameters, a bucket": {
			"--v=2 install --version R535 -module-arg nvidia.NVreg_EnableGpuFirmware=0 -module-arg " +
				"nvidia_uvm.uvm_debug_prints=1 -gcs-download-bucket=cos-tools-eu -debug", nil,
			"install --host-root=/root --driver=R535 --kernel-mirror=gs://cos-tools-eu " +
				"--module-param=nvidia.NVreg_EnableGpuFirmware=0 --module-param=nvidia_uvm.uvm_debug_prints=1 --log-level=debug",
			"",
		},
		"unsigned": {"install -allow-unsigned-driver -skip-nvidia-smi=false", nil, "install --host-root=/root",
			"-allow-unsigned-driver is ignored"},
		"a GPU type": {"install -target-gpu=NVIDIA_L4", nil, "install --host-root=/root",
			"-target-gpu is ignored: the GPUs of this node are read from the PCI bus; for the driver in a GPU type's own " +
				"list, set -version, as in -version=default@NVIDIA_L4"},
		"a GPU type's driver": {"install -version=default@NVIDIA_L4", nil,
			"install --host-root=/root --driver=default@NVIDIA_L4", ""},
		"the environment of older ones": {
			"install", map[string]string{"NVIDIA_DRIVER_VERSION": "535.261.03",
				"NVIDIA_INSTALL_DIR_CONTAINER": "/usr/local/nvidia"},
			"install --host-root=/root --driver=535.261.03", "",
		},
		// Source: GoogleCloudPlatform/cos-gpu-installer, cos-gpu-installer-docker/entrypoint.sh.
		"another source of older ones": {
			"install", map[string]string{"COS_DOWNLOAD_GCS": "https://storage.googleapis.com/mirror/12105.0.0",
				"GPU_INSTALLER_DOWNLOAD_URL": "https://example.com/NVIDIA-Linux-x86_64-418.67.run"},
			"install --host-root=/root", "the environment variable COS_DOWNLOAD_GCS is ignored: set " +
				"PREBAKE_KERNEL_MIRROR to the bucket that has BUILD_ID/BOARD, such as gs://cos-tools\nthe environment " +
				"variable GPU_INSTALLER_DOWNLOAD_URL is ignored: ",
		},
	} {
		ours, notes, err := cosinstaller.Translate(strings.Fields(row.line),
			func(name string) string { return row.env[name] })
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(strings.Fields(row.want), ours); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if !strings.Contains(strings.Join(notes, "\n"), row.note) || (row.note == "") != (len(notes) == 0) {
			t.Errorf("%s: notes %q; want %q", name, notes, row.note)
		}
	}
	for line, want := range map[string]bool{
		"fetcher install -host-dir=/var/lib/nvidia": true, "fetcher install --no-verify": true,
		"cos-gpu-installer list": true, "/cos-gpu-installer install": true,
		"fetcher install --driver latest --no-load": false, "fetcher run -host-dir=/x": false, "fetcher": false, "": false,
		"fetcher install -- -version=1": false,
	} {
		if got := cosinstaller.Recognise(strings.Fields(line)); got != want {
			t.Errorf("Recognise(%q) = %t; want %t", line, got, want)
		}
	}
	if _, _, err := cosinstaller.Translate([]string{"list"}, func(string) string { return "" }); !strings.Contains(
		fault.Hint(err), "fetcher resolve") {
		t.Errorf("list: %v (%s); want a hint that names fetcher resolve", err, fault.Hint(err))
	}
	for line, want := range map[string]string{
		"":     "is not supported",
		"list": "is not supported",
		"install -nvidia-installer-url=https://example.com/x.run": "does not support the flag -nvidia-installer-url",
		"install -local-artifacts-dir=/x -prepare-build-tools":    "does not support the flag -prepare-build-tools",
		"install -nonsense": "-nonsense",
		"install 535":       "want only flags",
	} {
		if _, _, err := cosinstaller.Translate(strings.Fields(line), func(string) string { return "" }); !fault.Is(err,
			fault.Usage) || !strings.Contains(err.Error(), want) || fault.Hint(err) == "" {
			t.Errorf("%q: %v (%s); want a usage error about %q", line, err, fault.Hint(err), want)
		}
	}
}
