package cosbucket

import (
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/target"
)

// FuzzListing parses a bucket's listing with one name per line. Each result must come from the listing, and only once.
func FuzzListing(f *testing.F) {
	f.Add("17800.66.78", "17800.66.78/lakitu/kernel_commit\n17800.66.78/kernel_commit\n17800.66.78/lakitu-arm64/kernel_commit")
	f.Add("17800.66.78", "17800.66.78/../kernel_commit\n17800.66.78//kernel_commit\n/\n")
	f.Add("x", "NVIDIA-Linux-x86_64-535.261.03.run\ntesla/535.309.01/NVIDIA-Linux-aarch64-535.309.01.run\nGRID/NVIDIA-Linux-x86_64-535.54.03-grid.run")
	f.Fuzz(func(t *testing.T, id, listing string) {
		names := strings.Split(listing, "\n")
		for i, k := range boards(id, slices.Clone(names)) {
			in := slices.ContainsFunc(names, func(name string) bool {
				parts := strings.Split(name, "/")
				return parts[len(parts)-1] == commitFile && (k.Board == legacyBoard || parts[len(parts)-2] == k.Board)
			})
			if _, err := target.ParseKernel(k.BuildID, k.Board); err != nil || k.BuildID != id || !in {
				t.Errorf("boards(%q, %q)[%d] = %+v, %v; want a kernel of the listing", id, names, i, k, err)
			}
		}
		for _, name := range names {
			version, arch, ok := ParseRunfile(name)
			if !ok {
				continue
			}
			again, machine, ok := ParseRunfile(RunfileName(version, arch))
			if !ok || again != version || machine != arch || !strings.HasSuffix(name, RunfileName(version, arch)) {
				t.Errorf("ParseRunfile(%q) = %q %q, and printed and read again %q %q %v", name, version, arch, again, machine, ok)
			}
		}
	})
}
