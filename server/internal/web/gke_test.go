package web_test

import (
	"html"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/api"
)

// TestPagesOfGKE checks that the pages for people show GKE versions and types of GPU.
func TestPagesOfGKE(t *testing.T) {
	t.Parallel()
	cat, pages := farm(t)
	fill(t, cat)
	ctx := t.Context()
	check(t, cat.RecordKernel(ctx, api.Kernel{Kernel: kernel, GPUs: map[string]api.GPUDrivers{
		"NVIDIA_H100_80GB": {Default: "535.261.03", Branches: map[string]string{"R535": "535.261.03"}},
		"NVIDIA_B200":      {Default: "570.86.10"},
	}}))
	check(t, cat.SawGKE(ctx, map[string][]string{kernel.String(): {"1.30.5-gke.200", "1.30.5-gke.100"}}))
	for path, want := range map[string][]string{
		"/": {"6.1.58+ · GKE 1.30.5-gke.200 and 1 more"},
		"/cells/lakitu/17800.66.78/535.261.03": {
			"Nodes of GKE that boot it</dt><dd>1.30.5-gke.200, 1.30.5-gke.100<",
			"COS names this driver for</dt><dd>NVIDIA_H100_80GB (default, R535)<",
		},
		"/preflight?build=1.30.5-gke.100&board=lakitu&driver=default@NVIDIA_H100_80GB": {
			"Yes, it may move", `value="1.30.5-gke.100"`,
			"Nodes of GKE 1.30.5-gke.100, COS build 17800.66.78/lakitu would run driver 535.261.03",
		},
		"/preflight?build=1.31.0-gke.7&board=lakitu": {"No, not yet", "Nodes of GKE 1.31.0-gke.7, a build that is not known,",
			"--gke-map"},
		"/preflight?build=%3Cx%3E-gke.&board=lakitu": {"That cannot be asked", "&lt;x&gt;"},
	} {
		_, got := get(t, pages, path)
		for _, text := range want {
			if !strings.Contains(html.UnescapeString(got), html.UnescapeString(text)) {
				t.Errorf("GET %s lacks %q:\n%s", path, text, got)
			}
		}
		if strings.Contains(got, "<x>") {
			t.Errorf("GET %s has <x> as it was sent", path)
		}
	}
}
