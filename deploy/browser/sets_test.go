package browser

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/deploy/internal/testserver"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/testkit/program"
)

const secret = testserver.Token

// set is a server with a data set.
type set struct {
	Name, URL string
	// Vars has the values of the names in the pages' paths.
	Vars   map[string]string
	client *api.Client
}

// startSets starts a server for each data set. By default it starts all three:
//
//   - empty: no kernel is known, and no cell was requested
//   - small: some kernels of three boards, and cells in every state
//   - large: one year of a farm with 60,000 cells, see server/bench
func startSets(t *testing.T, names ...string) []*set {
	t.Helper()
	if len(names) == 0 {
		names = []string{"empty", "small", "large"}
	}
	dir := t.TempDir()
	server := program.Build(t, "server", "")
	var sets []*set
	for _, name := range names {
		data := filepath.Join(dir, name)
		s := &set{Name: name, Vars: map[string]string{}}
		switch name {
		case "empty":
			s.start(t, server, data)
		case "small":
			mirror := makeMirror(t, filepath.Join(dir, "mirror"))
			s.start(t, server, data,
				"--kernel-mirror", "file://"+mirror+"/cos", "--driver-mirror", "file://"+mirror+"/drivers")
			fillSmall(t, s)
		case "large":
			database := "sqlite://" + data + ".db"
			fill := exec.CommandContext(t.Context(), program.Build(t, "server/bench", ""),
				"-fill-only", "-database", database, "-builds", "5000", "-queue", "500")
			if out, err := fill.CombinedOutput(); err != nil {
				t.Fatalf("fill the large catalogue: %v: %s", err, out)
			}
			s.start(t, server, data, "--database", database)
			findLarge(t, s)
		}
		sets = append(sets, s)
	}
	return sets
}

// start runs the server until the test ends.
func (s *set) start(t *testing.T, program, data string, args ...string) {
	t.Helper()
	// All calls come from one address, so the limit for each address is off.
	s.URL = testserver.Start(t, program, data, append([]string{"--client-rate", "0"}, args...)...)
	s.client = api.NewClient(s.URL, secret, nil)
}

// wait repeats a check until the check returns true. The test fails after a minute.
func wait(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after a minute it is still not true that %s", what)
		}
	}
}

// release is a COS build in the mirror of the small set.
type release struct {
	id, standard string // standard is its default driver
	boards       []string
}

var releases = []release{
	{"17800.66.78", "535.261.03", []string{"lakitu", "anthos-amd64-vmware"}},
	{"17800.66.90", "535.261.03", []string{"lakitu", "anthos-amd64-vmware"}},
	{"18613.75.4", "550.163.01", []string{"lakitu"}},
	{"19216.104.25", "580.95.05", []string{"lakitu", "lakitu-arm64"}},
	{"19999.20.1", "580.95.05", []string{"lakitu", "lakitu-arm64"}},
}

// runfiles are the drivers in the mirror of the small set. Branches from R620 on have only open modules.
var runfiles = []string{
	"x86_64-535.261.03", "x86_64-550.163.01", "x86_64-580.95.05", "aarch64-580.95.05", "x86_64-620.20.01",
}

// makeMirror writes the files that the server reads in COS's and NVIDIA's buckets.
func makeMirror(t *testing.T, dir string) string {
	t.Helper()
	put := func(name, text string) {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i, r := range releases {
		for _, board := range r.boards {
			put(filepath.Join("cos", r.id, board, "kernel_commit"), strings.Repeat(fmt.Sprintf("%x", i+10), 40)+"\n")
			put(filepath.Join("cos", r.id, board, "gpu_default_version"), r.standard+"\n")
			put(filepath.Join("cos", r.id, board, "gpu_latest_version"), "580.95.05\n")
		}
	}
	for _, name := range runfiles {
		put("drivers/NVIDIA-Linux-"+name+".run", "no driver")
	}
	return dir
}

// findLarge reads the values for the pages' paths from the catalogue that server/bench filled.
func findLarge(t *testing.T, s *set) {
	t.Helper()
	for _, state := range []api.State{api.Failed, api.Published, api.Queued} {
		var builds []api.Build
		s.get(t, "/v1/builds?limit=1&state="+string(state), &builds)
		if len(builds) != 1 {
			t.Fatalf("large: %d %s builds; want one", len(builds), state)
		}
		s.Vars[string(state)] = fmt.Sprint(builds[0].ID)
	}
	var kernels []api.Kernel
	var cells []api.Resolution
	s.get(t, "/v1/kernels?limit=1&milestone=109", &kernels)
	if len(kernels) != 1 {
		t.Fatalf("large: %d kernels of milestone 109; want one", len(kernels))
	}
	k := kernels[0]
	s.get(t, "/v1/cells?buildId="+k.BuildID+"&board="+k.Board, &cells)
	i := slices.IndexFunc(cells, func(c api.Resolution) bool { return c.State == api.Published })
	if i < 0 {
		t.Fatalf("large: kernel %s has no published cell; want one", k.Kernel)
	}
	s.setCell(cells[i])
	for _, c := range cells {
		if c.State == api.Unknown {
			s.Vars["unknown"] = cellPath(c)
		}
	}
}

// setCell sets the values for paths that consist of parts of a cell.
func (s *set) setCell(c api.Resolution) {
	branch, _, _ := strings.Cut(c.Kernel.BuildID, ".")
	maps.Copy(s.Vars, map[string]string{
		"board": c.Kernel.Board, "build": c.Kernel.BuildID, "milestone": fmt.Sprint(c.Kernel.Milestone),
		"branch": branch, "version": c.Driver.Version, "flavour": string(c.Driver.Flavour),
	})
}

func cellPath(c api.Resolution) string {
	return strings.Join([]string{c.Kernel.Board, c.Kernel.BuildID, c.Driver.Version, string(c.Driver.Flavour)}, "/")
}

// get reads one page of a list. api.Client would read all pages.
func (s *set) get(t *testing.T, path string, out any) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s = %s, %v; want 200", path, resp.Status, err)
	}
}
