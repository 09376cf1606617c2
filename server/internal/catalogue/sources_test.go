package catalogue_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/catalogue"
	"github.com/prebake/prebake/server/internal/store"
)

const v580 = "580.95.05"

// withGPUs returns a catalogue with one kernel. The kernel has two GKE versions, and some types of GPU have their own
// default drivers.
func withGPUs(t *testing.T) (*catalogue.Catalogue, *fakeQueue) {
	t.Helper()
	c, q := open(t)
	k := api.Kernel{Kernel: target.Kernel{BuildID: first, Board: "lakitu", Milestone: 109, Arch: target.AMD64},
		Default: v261, GPUs: map[string]api.GPUDrivers{
			"NVIDIA_H100_80GB": {Default: v309, Branches: map[string]string{"R535": v309, "R580": v580}},
			"NVIDIA_B200":      {Default: v580, Latest: v580, Branches: map[string]string{"R580": v580}},
		}}
	if err := c.RecordKernel(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	gke := map[string][]string{first + "/lakitu": {"1.33.5-gke.1080000", "1.32.9-gke.100"},
		"1.1.1/lakitu": {"1.1.1-gke.1"}}
	if err := c.SawGKE(t.Context(), gke); err != nil {
		t.Fatal(err)
	}
	return c, q
}

// TestResolveForAGPU checks that a question or a request with a type of GPU gets the driver that COS lists for that
// type.
func TestResolveForAGPU(t *testing.T) {
	t.Parallel()
	c, _ := withGPUs(t)
	for wish, want := range map[string]string{
		"default": v261, "default@NVIDIA_H100_80GB": v309, "default@NVIDIA_B200": v580, "latest@NVIDIA_B200": v580,
		"R580@NVIDIA_H100_80GB": v580, "latest@NVIDIA_H100_80GB": "", "default@NVIDIA_L4": "",
	} {
		r, err := c.Resolve(t.Context(), first, "lakitu", wish, "open", "")
		if err != nil || r.Driver.Version != want || r.State != api.Unknown ||
			(want == "" && (r.Reason == "" || r.Hint == "")) {
			t.Errorf("Resolve(%s) = %+v, %v; want %q, or a reason and a hint", wish, r, err, want)
		}
	}
	for _, wish := range []string{"default@", "default@x", v261 + "@NVIDIA_B200", "@NVIDIA_B200"} {
		if _, err := c.Resolve(t.Context(), first, "lakitu", wish, "", ""); !fault.Is(err, fault.Usage) {
			t.Errorf("Resolve(%s) = %v; want usage", wish, err)
		}
	}
	if b := request(t, c, first, "default@NVIDIA_B200", "open"); b.Driver.Version != v580 {
		t.Errorf("Request(default@NVIDIA_B200) = driver %s; want %s", b.Driver, v580)
	}
	labels := catalogue.GPULabels(mustKernel(t, c), v580)
	want := []catalogue.GPULabel{{GPU: "NVIDIA_B200", Labels: []string{"default", "latest", "R580"}},
		{GPU: "NVIDIA_H100_80GB", Labels: []string{"R580"}}}
	if diff := cmp.Diff(want, labels); diff != "" {
		t.Errorf("GPULabels (-want +got):\n%s", diff)
	}
}

func mustKernel(t *testing.T, c *catalogue.Catalogue) api.Kernel {
	t.Helper()
	all, _, err := c.Kernels(t.Context(), store.KernelFilter{GKE: "1.33"}, store.Page{})
	if err != nil || len(all) != 1 {
		t.Fatalf("Kernels(GKE 1.33) = %v, %v; want one", all, err)
	}
	return all[0]
}

// TestPlanForAGPU plans a wish list that names a type of GPU. One of the kernels has driver lists only for types of
// GPU.
func TestPlanForAGPU(t *testing.T) {
	t.Parallel()
	c, q := withGPUs(t)
	only := api.Kernel{Kernel: target.Kernel{BuildID: "17800.0.46", Board: "lakitu", Milestone: 109},
		GPUs: map[string]api.GPUDrivers{"NVIDIA_B200": {Default: v309}}}
	if err := c.RecordKernel(t.Context(), only); err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(wishes, "[default]", "[default@NVIDIA_B200]", 1)
	if _, err := c.PutWishList(t.Context(), "production", text, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Plan(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{first + " " + v580 + " open !!", "17800.0.46 " + v309 + " open !!"},
		jobs(q)); diff != "" {
		t.Errorf("queued (-want +got):\n%s", diff)
	}
}

// TestPreflightOfGKE asks whether a node pool may be upgraded to a GKE version.
func TestPreflightOfGKE(t *testing.T) {
	t.Parallel()
	c, _ := withGPUs(t)
	ask := func(pool api.Pool) (api.PoolVerdict, error) {
		answer, err := c.Preflight(t.Context(), api.PreflightRequest{Pools: []api.Pool{pool}})
		if err != nil {
			return api.PoolVerdict{}, err
		}
		return answer.Pools[0], nil
	}
	pool := api.Pool{GKE: "v1.32.9-gke.100", Board: "lakitu", Driver: "default@NVIDIA_H100_80GB", Flavour: "open"}
	v, err := ask(pool)
	if err != nil || v.Resolution.Kernel.BuildID != first || v.Resolution.Driver.Version != v309 || v.May ||
		v.Pool != pool {
		t.Errorf("Preflight(%+v) = %+v, %v; want COS build %s with driver %s, not published", pool, v, err, first, v309)
	}
	// The server does not know the first version. For the second version, it does not know the COS build.
	for _, gke := range []string{"1.31.0-gke.7", "1.1.1-gke.1"} {
		v, err = ask(api.Pool{GKE: gke, Board: "lakitu"})
		if err != nil || v.May || v.Resolution.State != api.Unknown || v.Resolution.Reason == "" || v.Resolution.Hint == "" {
			t.Errorf("Preflight(GKE %s) = %+v, %v; want unknown with reason and hint", gke, v, err)
		}
	}
	if v, err = ask(api.Pool{GKE: "1.32.9-gke.100", Board: "lakitu-arm64"}); err != nil ||
		v.Resolution.State != api.Unknown {
		t.Errorf("Preflight(another board) = %+v, %v; want unknown", v, err)
	}
	// If a GKE version has two COS builds, the server cannot know which of them a node boots.
	second := api.Kernel{Kernel: target.Kernel{BuildID: "17800.0.46", Board: "lakitu", Milestone: 109}, Default: v261}
	if err := c.RecordKernel(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if err := c.SawGKE(t.Context(), map[string][]string{"17800.0.46/lakitu": {"1.32.9-gke.100"}}); err != nil {
		t.Fatal(err)
	}
	v, err = ask(pool)
	if r := v.Resolution; err != nil || v.May || r.State != api.Unknown || !strings.Contains(r.Reason, first) ||
		!strings.Contains(r.Reason, "17800.0.46") || !strings.Contains(r.Hint, "ask with BUILD_ID") {
		t.Errorf("Preflight(GKE of two builds) = %+v, %v; want unknown that names both", v, err)
	}
	for _, bad := range []api.Pool{
		{GKE: "1.33", Board: "lakitu"}, {GKE: "1.33.5-gke.1%", Board: "lakitu"},
		{GKE: "1.32.9-gke.100", BuildID: first, Board: "lakitu"},
		{GKE: "1.32.9-gke.100"}, {GKE: "1.32.9-gke.100", Board: "<x>"},
	} {
		if _, err := ask(bad); !fault.Is(err, fault.Usage) {
			t.Errorf("Preflight(%+v) = %v; want usage", bad, err)
		}
	}
}

// TestSawGKE checks which GKE versions are accepted. It also checks that they are recorded for more kernels than one
// transaction writes.
func TestSawGKE(t *testing.T) {
	t.Parallel()
	c, _ := open(t)
	for _, bad := range []string{"1.33", "v1.33.5-gke.1", `1.33.5-gke.1"`} {
		if err := c.SawGKE(t.Context(), map[string][]string{first + "/lakitu": {bad}}); !fault.Is(err, fault.Usage) {
			t.Errorf("SawGKE(%s) = %v; want usage", bad, err)
		}
	}
	many := map[string][]string{}
	for n := range 450 {
		k := target.Kernel{BuildID: fmt.Sprintf("17800.1.%d", n), Board: "lakitu"}
		if err := c.RecordKernel(t.Context(), api.Kernel{Kernel: k}); err != nil {
			t.Fatal(err)
		}
		many[k.String()] = []string{"1.33.5-gke.1"}
	}
	if err := c.SawGKE(t.Context(), many); err != nil {
		t.Fatal(err)
	}
	for _, gke := range []string{"1.33", "1.33.5", "1.33.5-gke.1"} {
		all, _, err := c.Kernels(t.Context(), store.KernelFilter{GKE: gke}, store.Page{Limit: 1000})
		if err != nil || len(all) != 450 {
			t.Errorf("Kernels(GKE %s) = %d kernels, %v; want 450", gke, len(all), err)
		}
	}
	for _, bad := range []string{"1", "1.33.%", "1.33.5-gke", "_.33", strings.Repeat("1", 300)} {
		if _, _, err := c.Kernels(t.Context(), store.KernelFilter{GKE: bad}, store.Page{}); !fault.Is(err, fault.Usage) {
			t.Errorf("Kernels(GKE %.20s) = %v; want usage", bad, err)
		}
	}
}
