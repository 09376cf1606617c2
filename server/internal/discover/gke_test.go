package discover_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/server/internal/discover"
)

// gkeMap is like https://www.gstatic.com/gke-image-maps/gke-to-cos.json. The fields, the form of creation_time, and the
// BUILD_ID in an image's name are from tools/gke-gpu-driver-version of GoogleCloudPlatform/professional-services. The
// first GKE version is from that tool's README. The names of images are from gVisor's
// test/gpu/cos_gpu_compatibility_test.go.
const gkeMap = `{"creation_time": "2026-11-01T08:00:00.123456Z", "entries": [
	{"gke_version": "1.33.5-gke.1080000", "image": "cos-121-18867-199-52"},
	{"gke_version": "1.33.5-gke.200", "image": "cos-121-18867-199-52"},
	{"gke_version": "1.33.5-gke.200", "image": "cos-121-18867-199-52"},
	{"gke_version": "1.33.5-gke.1080000", "image": "cos-arm64-121-18867-199-52"},
	{"gke_version": "1.30.5-gke.100", "image": "cos-109-17800-66-78"},
	{"gke_version": "1.29.1-gke.1", "image": "cos-105-17412-1-1"},
	{"gke_version": "odd\\\"%", "image": "cos-109-17800-66-78"},
	{"gke_version": "1.31.0-gke.7", "image": "ubuntu-gke-2404-1-34-amd64-v20260130"}
]}`

func names(kernels []api.Kernel) (all []string) {
	for _, k := range kernels {
		all = append(all, k.String())
	}
	slices.Sort(all)
	return all
}

// TestGKE checks that discovery reads the old COS builds in the list of images, records the GKE versions of kernels,
// and removes versions that are not in the list any more. If nothing has changed, it must write nothing.
func TestGKE(t *testing.T) {
	t.Parallel()
	commit := strings.Repeat("a", 40)
	files := map[string]string{}
	for _, build := range []string{"18867.199.52/lakitu", "18867.199.52/lakitu-arm64", "18867.294.1/lakitu"} {
		files[build+"/kernel_commit"] = commit + "\n"
	}
	mirror, maps := lay(t, files), lay(t, map[string]string{"gke-to-cos.json": gkeMap})
	was := func(id string, gke ...string) api.Kernel {
		return api.Kernel{Kernel: target.Kernel{BuildID: id, Board: "lakitu", Commit: commit}, GKE: gke, SeenAt: time.Now()}
	}
	n := &notes{known: []api.Kernel{was("17800.66.78"), was("16000.1.1", "1.20.1-gke.1"), was("18867.294.1")}}
	source := &discover.GKE{Map: maps + "/gke-to-cos.json", URL: mirror}
	if _, err := source.Look(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"18867.199.52/lakitu", "18867.199.52/lakitu-arm64"}, names(n.kernels)); diff != "" {
		t.Errorf("kernels that were read (-want +got):\n%s", diff)
	}
	if n.kernels[0].Milestone != 121 || n.kernels[0].Commit != commit {
		t.Errorf("kernel = %+v; want the milestone of the image and the commit of the mirror", n.kernels[0].Kernel)
	}
	if diff := cmp.Diff(map[string][]string{"17800.66.78/lakitu": {"1.30.5-gke.100"}, "16000.1.1/lakitu": nil},
		n.gke); diff != "" {
		t.Errorf("labels that changed (-want +got):\n%s", diff)
	}
	n = &notes{known: append(n.known[:1:1], n.kernels...)}
	if k, err := source.Look(t.Context(), n); k != 3 || err != nil || len(n.kernels) != 0 {
		t.Errorf("the second Look() = %d, %v, and read %d kernels; want 3 and none", k, err, len(n.kernels))
	}
	want := map[string][]string{
		"17800.66.78/lakitu": {"1.30.5-gke.100"}, "18867.199.52/lakitu-arm64": {"1.33.5-gke.1080000"},
		"18867.199.52/lakitu": {"1.33.5-gke.1080000", "1.33.5-gke.200"},
	}
	if diff := cmp.Diff(want, n.gke); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	for i := range n.known {
		n.known[i].GKE = want[n.known[i].String()]
	}
	if _, err := source.Look(t.Context(), n); err != nil || len(n.gke) != 0 {
		t.Errorf("the third Look() changes %v, %v; want nothing", n.gke, err)
	}
}

// TestGKEOfAMirrorWithoutListing checks a mirror that cannot list its content. Discovery must find its COS builds by
// the list of images.
func TestGKEOfAMirrorWithoutListing(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/maps/gke-to-cos.json":
			fmt.Fprint(w, gkeMap)
		case "/cos/18867.199.52/lakitu/kernel_commit":
			fmt.Fprintln(w, strings.Repeat("a", 40))
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	n := &notes{}
	if _, err := (&discover.GKE{Map: server.URL + "/maps/gke-to-cos.json", URL: server.URL + "/cos"}).Look(t.Context(),
		n); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"18867.199.52/lakitu"}, names(n.kernels)); diff != "" {
		t.Errorf("kernels (-want +got):\n%s", diff)
	}
}

// TestGKERemembersMisses checks that discovery waits for a day before it looks again for a kernel that the mirror
// lacks.
func TestGKERemembersMisses(t *testing.T) {
	t.Parallel()
	text := []byte(strings.Repeat("a", 40) + "\n")
	mirror := lay(t, map[string]string{"18867.199.52/lakitu/kernel_commit": string(text)})
	source := &discover.GKE{Map: lay(t, map[string]string{"map": gkeMap}) + "/map", URL: mirror}
	synctest.Test(t, func(t *testing.T) {
		n := &notes{}
		look := func(when string, want ...string) {
			t.Helper()
			n = &notes{known: append(n.known, n.kernels...)}
			if _, err := source.Look(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, names(n.kernels)); diff != "" {
				t.Errorf("Look() %s reads (-want +got):\n%s", when, diff)
			}
		}
		look("at first", "18867.199.52/lakitu")
		file := filepath.Join(strings.TrimPrefix(mirror, "file://"), "18867.199.52/lakitu-arm64/kernel_commit")
		if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		look("at once")
		time.Sleep(23 * time.Hour)
		look("within a day")
		time.Sleep(time.Hour)
		look("after a day", "18867.199.52/lakitu-arm64")
	})
}

// TestGKERefusesOtherLists checks that discovery removes no GKE version if the list of images is another kind of file.
func TestGKERefusesOtherLists(t *testing.T) {
	t.Parallel()
	maps := lay(t, map[string]string{
		"html": "<!doctype html>", "empty": `{"entries": []}`, "images": `{"entries": [{"image": "cos-109-17800-66-78"}]}`,
	})
	known := []api.Kernel{{Kernel: target.Kernel{BuildID: "17800.66.78", Board: "lakitu", Commit: "c"},
		GKE: []string{"1.30.5-gke.100"}}}
	for _, name := range []string{"html", "empty", "images"} {
		n := &notes{known: known}
		_, err := (&discover.GKE{Map: maps + "/" + name, URL: maps}).Look(t.Context(), n)
		if !fault.Is(err, fault.Unsupported) || fault.Hint(err) == "" || n.gke != nil {
			t.Errorf("Look(%s) = %v, labels %v; want unsupported with a hint, and no label changed", name, err, n.gke)
		}
	}
}
