package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// TestGKEAndGPUs asks a server about GKE versions and types of GPU. The list of images has the form of gke-to-cos.json
// (see package discover). The driver lists have the form of gpu_driver_versions.proto of cos/tools.
func TestGKEAndGPUs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"cos/18867.199.52/lakitu/kernel_commit":       strings.Repeat("a", 40) + "\n",
		"cos/18867.199.52/lakitu/gpu_default_version": "535.261.03\n",
		"cos/18867.199.52/lakitu/gpu_driver_versions.textproto": `gpu_driver_version_info {
  gpu_device { gpu_type: "NVIDIA_H100_80GB" } supported_driver_versions { label: "DEFAULT" version: "580.95.05" } }`,
		"gke-to-cos.json": `{"creation_time": "2026-11-01T08:00:00Z", "entries": [
  {"gke_version": "1.33.5-gke.1080000", "image": "cos-121-18867-199-52"}]}`,
	} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if code, _, stderr := run(t, "serve", "--data", t.TempDir(), "--gke-map",
		"file://"+dir+"/gke-to-cos.json"); code != 2 ||
		!strings.Contains(stderr, "give --kernel-mirror URL too") {
		t.Errorf("serve without a kernel mirror = %d, %s; want 2 and a hint", code, stderr)
	}
	url, _, log := start(t, filepath.Join(t.TempDir(), "state"),
		"--kernel-mirror", "file://"+dir+"/cos", "--gke-map", "file://"+dir+"/gke-to-cos.json")
	ask := func(args ...string) (int, string, string) {
		t.Helper()
		return run(t, append(args, "--server", url)...)
	}
	deadline, end := context.WithTimeout(t.Context(), time.Minute)
	defer end()
	for {
		if _, out, _ := ask("kernels", "--gke", "v1.33.5"); strings.Contains(out, "18867.199.52") {
			break
		}
		select {
		case <-deadline.Done():
			t.Fatalf("no kernel of GKE after a minute:\n%s", log)
		case <-time.After(20 * time.Millisecond):
		}
	}
	for _, step := range []struct {
		args []string
		code int
		out  string
		err  string
	}{
		{[]string{"kernels"}, 0, "BUILD_ID      BOARD   M    ABI  DEFAULT     RELEASE", ""},
		{[]string{"kernels", "--gke", "1.33"}, 0, "18867.199.52  lakitu  121  535.261.03  1.33.5-gke.1080000", ""},
		{[]string{"kernels", "--gke", "1.34"}, 0, "no kernel of this GKE version is known yet", ""},
		{[]string{"kernels", "--gke", "x"}, 2, "", "write a version such as 1.33"},
		{[]string{"gpus", "--gke", "1.33"}, 0, "18867.199.52/lakitu  NVIDIA_H100_80GB  580.95.05  -       R580 580.95.05",
			""},
		{[]string{"gpus", "--gpu", "NVIDIA_L4"}, 0, "no such COS build has a driver list", ""},
		{[]string{"gpus"}, 2, "", "--build-id, --milestone, --gke and --gpu"},
		{[]string{"preflight", "1.33.5-gke.1080000:lakitu:default@NVIDIA_H100_80GB"}, fault.NoArtifact.ExitCode(),
			"580.95.05", "server request --build-id 18867.199.52"},
		{[]string{"preflight", "1.33.5-gke.1080000", "1.34.0-gke.1"}, fault.NoArtifact.ExitCode(), "1.34.0-gke.1/lakitu",
			"2 of 2 pools"},
		{[]string{"preflight", "1.34.0-gke.1"}, fault.NoArtifact.ExitCode(), "", "for GKE 1.34.0-gke.1/lakitu is unknown"},
	} {
		code, out, stderr := ask(step.args...)
		if code != step.code || !strings.Contains(out, step.out) || !strings.Contains(stderr, step.err) {
			t.Errorf("server %s = %d\n%s%s; want %d, %q and %q", strings.Join(step.args, " "), code, out, stderr, step.code,
				step.out, step.err)
		}
	}
	_, out, _ := ask("gpus", "--build-id", "18867.199.52", "--output", "json")
	var all []struct {
		GPU string
		api.GPUDrivers
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != 1 || all[0].Default != "580.95.05" {
		t.Errorf("gpus as JSON = %s, %v; want one with its default", out, err)
	}
}
