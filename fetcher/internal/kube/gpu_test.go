package kube

import (
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/agent"
	"github.com/prebake/prebake/fetcher/internal/devnode"
	"github.com/prebake/prebake/fetcher/internal/gpucheck"
	"github.com/prebake/prebake/fetcher/internal/kmod"
	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/fetcher/internal/report"
	"github.com/prebake/prebake/pkg/timeline"
)

// TestGPUOfThisMachine compares what the fetcher reports with /proc/driver/nvidia of this machine. The test changes
// nothing. It needs a GPU, the path of nvmlprobe in PREBAKE_PROBE, and an os-release of COS, for example by a bind
// mount.
func TestGPUOfThisMachine(t *testing.T) {
	program := os.Getenv("PREBAKE_PROBE")
	if program == "" {
		t.Skip("PREBAKE_PROBE is not set: want nvmlprobe, on a machine with a GPU")
	}
	node, err := noderoot.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	a := agent.New(agent.Config{InstallDir: "/home/kubernetes/bin/nvidia"}, agent.Parts{
		Node: node, Kernel: kmod.Linux{}, Nodes: devnode.Linux{}, Line: &timeline.Run{}, Now: time.Now,
		Log:   slog.New(slog.DiscardHandler),
		Probe: &gpucheck.Prober{Program: program, Node: node, ReadOnly: true},
	})
	s, err := a.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// /proc/driver/nvidia has the version, and a folder for each GPU.
	raw, err := os.ReadFile("/proc/driver/nvidia/version")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`[0-9]+\.[0-9]+(\.[0-9]+)?`).FindString(string(raw))
	gpus, err := os.ReadDir("/proc/driver/nvidia/gpus")
	if err != nil {
		t.Fatal(err)
	}
	v := s.Verdict
	if v.UsableGPUs != len(gpus) || len(v.NVML.Devices) != len(gpus) || v.NVML.Version != version {
		t.Errorf("verdict = %+v; want %d GPUs of %s", v, len(gpus), version)
	}
	labels := state{verdict: v}.metadata()["labels"].(map[string]any)
	if labels[labelVersion] != version || labels[labelState] != string(gpucheck.Foreign) {
		t.Errorf("labels = %v; want %s, foreign", labels, version)
	}
	told := report.New(time.Now)
	told.Report(v)
	w := httptest.NewRecorder()
	told.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	text, err := io.ReadAll(w.Body)
	if err != nil || !strings.Contains(string(text), version) {
		t.Errorf("metrics, %v:\n%s", err, text)
	}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "prebake_") && !strings.Contains(line, "_bucket") {
			t.Log(strings.TrimSpace(line))
		}
	}
	for _, d := range v.NVML.Devices {
		t.Logf("%+v", d)
	}
	t.Log(labels)
}
