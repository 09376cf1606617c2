package testbed

import (
	"fmt"
	"io"
	"strings"

	"github.com/prebake/prebake/pkg/timeline"
)

// Report has the fields of the output of `fetcher install --output json` that the demo and the tests read.
type Report struct {
	Changed      bool     `json:"changed"`
	SignedBy     string   `json:"signedBy"`
	Plan         []string `json:"plan"`
	FetchedBytes int64    `json:"fetchedBytes"`
	CachedBytes  int64    `json:"cachedBytes"`
	Verdict      struct {
		State   string            `json:"verdict"`
		Reason  string            `json:"reason"`
		Digest  string            `json:"digest"`
		Modules map[string]string `json:"modules"`
		NVML    struct {
			Version string `json:"version"`
			Error   string `json:"error"`
		} `json:"nvml"`
		PCIGPUs    int      `json:"pciGPUs"`
		UsableGPUs int      `json:"usableGPUs"`
		NVRM       []string `json:"nvrm"`
	} `json:"verdict"`
	Phases []timeline.Phase `json:"phases"`
}

// Live returns the NVIDIA modules in /proc/modules, with dashes in place of underscores.
func Live(procModules []byte) []string {
	var live []string
	for line := range strings.Lines(string(procModules)) {
		name, _, _ := strings.Cut(line, " ")
		if strings.HasPrefix(name, "nvidia") {
			live = append(live, strings.ReplaceAll(name, "_", "-"))
		}
	}
	return live
}

// Print prints a node's verdict for people.
func (r *Report) Print(w io.Writer, exitCode int, live []string) {
	v := r.Verdict
	fmt.Fprintf(w, "  verdict   %s (exit code %d)\n", v.State, exitCode)
	if v.Reason != "" {
		fmt.Fprintf(w, "  because   %s\n", v.Reason)
	}
	fmt.Fprintf(w, "  live      %s\n", orNone(strings.Join(live, " ")))
	fmt.Fprintf(w, "  NVML      %s\n", orNone(strings.TrimSpace(v.NVML.Version+" "+v.NVML.Error)))
	fmt.Fprintf(w, "  GPUs      %d on PCI, %d usable\n", v.PCIGPUs, v.UsableGPUs)
	for _, line := range v.NVRM {
		fmt.Fprintf(w, "  kernel    %s\n", line)
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
