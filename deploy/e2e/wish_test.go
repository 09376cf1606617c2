package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
)

// matrixReport has the fields of the JSON output of build --wish that the test checks.
type matrixReport struct {
	Cells []struct {
		Cell struct {
			Kernel target.Kernel
			Driver target.Driver
		}
		State   string
		Digest  string
		Known   bool
		Failure *struct{ Class, Error string }
	}
	States map[string]int
}

// TestWishList builds every flavour of every driver version for several kernels with one command. Only the cell with a
// real API break may fail. The report must show the compiler's first error line for this cell. A second run must build
// nothing.
func TestWishList(t *testing.T) {
	t.Parallel()
	defer shared.turns.take(15)()
	dir := t.TempDir()
	var wish strings.Builder
	wish.WriteString("version: 1\nkernels:\n")
	// The COS builds have the two oldest kernels, one of these kernels a second time, and the newest kernel.
	builds := 0
	for i, b := range shared.mirror.Builds {
		if i < 3 || b.Kernel == shared.newest() {
			fmt.Fprintf(&wish, "  - {build: %s, board: %s}\n", b.BuildID, b.Board)
			builds++
		}
	}
	wish.WriteString("drivers:\n")
	for _, d := range shared.mirror.Drivers {
		fmt.Fprintf(&wish, "  - version: %s\n", d.Version)
	}
	wish.WriteString("flavours: [proprietary, open]\n")
	file := filepath.Join(dir, "wish.yaml")
	if err := os.WriteFile(file, []byte(wish.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(dir, "farm")
	run := func(output string) []byte {
		t.Helper()
		res, err := shared.Run(t.Context(), "builder", "build", "--wish", file, "--to", "oci:"+layout, "--key", shared.key,
			"--kernel-mirror", shared.mirror.KernelURL(), "--driver-mirror", shared.mirror.DriverURL(), "--cache",
			shared.BuildCache(), "--output", output)
		if err != nil {
			t.Fatal(err)
		}
		if res.Code != fault.APIBreak.ExitCode() {
			t.Fatalf("build --wish ends with %d; want %d, the code of the one cell that fails\n%s", res.Code,
				fault.APIBreak.ExitCode(),
				res.Stdout)
		}
		return res.Stdout
	}
	read := func(out []byte) (r matrixReport) {
		t.Helper()
		if err := json.Unmarshal(out, &r); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		return r
	}
	// There is a cell for each driver version, COS build and flavour. One version has no open flavour.
	first := read(run("json"))
	if n := len(first.Cells); n != builds*2*len(shared.mirror.Drivers) || first.States["unavailable"] != builds ||
		first.States["failed"] != 1 || first.States["published"] != n-builds-1 {
		t.Errorf("%d cells: %v; want one failed, %d unavailable, all others published", n, first.States, builds)
	}
	for _, c := range first.Cells {
		name := c.Cell.Kernel.String() + " " + c.Cell.Driver.String()
		switch c.State {
		case "failed":
			if c.Cell.Kernel.BuildID != shared.newest().BuildID || c.Cell.Driver.Flavour != target.Open ||
				c.Failure.Class != fault.APIBreak.String() ||
				!strings.Contains(c.Failure.Error, "nv-pci.c") || !strings.Contains(c.Failure.Error, "pci_resize_resource") {
				t.Errorf("%s failed: %+v; want the API break of the open flavour on the newest kernel", name, c.Failure)
			}
		case "published":
			if c.Digest == "" {
				t.Errorf("%s is published under no digest", name)
			}
		}
	}
	second := read(run("json"))
	if second.States["published"] != 0 || second.States["existed"] != first.States["published"] {
		t.Errorf("the second run: %v; want everything existed", second.States)
	}
	for i, c := range second.Cells {
		if c.Digest != first.Cells[i].Digest || c.State == "failed" && !c.Known {
			t.Errorf("the second run: %+v; want what the first one saw: %+v", c, first.Cells[i])
		}
	}
	table := string(run("text"))
	for _, text := range []string{"nv-pci.c", "pci_resize_resource", "api-break", shared.newest().BuildID, "unavailable"} {
		if !strings.Contains(table, text) {
			t.Errorf("the table does not name %q:\n%s", text, table)
		}
	}
	for line := range strings.Lines(table) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}
