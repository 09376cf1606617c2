package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// banned maps the import paths of packages that the fetcher must not link to the reason. A path that ends with a slash
// bans all packages below that path, too.
var banned = map[string]string{
	"runtime/cgo": "the program is static: it runs in any image and beside any C " +
		"library",
	"database/sql":                                       "the catalogue is the server's",
	"modernc.org/":                                       "the catalogue is the server's",
	"github.com/jackc/":                                  "the catalogue is the server's",
	"github.com/riverqueue/":                             "the queue is the farm's",
	"github.com/go-chi/":                                 "a node routes nothing",
	"github.com/danielgtaylor/huma/":                     "a node has no API of its own",
	"github.com/NVIDIA/":                                 "NVML needs cgo; nvmlprobe has it",
	"github.com/sigstore/sigstore-go/pkg/sign":           "a node verifies and never signs",
	"github.com/sigstore/sigstore/pkg/signature/kms":     "a node verifies and never signs",
	"github.com/prebake/prebake/pkg/snapshot/maker":      "a node verifies and never signs",
	"cloud.google.com/":                                  "build inputs are the builder's",
	"github.com/prebake/prebake/builder/":                "components share pkg only",
	"github.com/prebake/prebake/server/":                 "components share pkg only",
	"github.com/prebake/prebake/pkg/testkit":             "it holds private keys",
	"github.com/prebake/prebake/pkg/queue":               "the queue is the farm's",
	"github.com/prebake/prebake/fetcher/internal/sample": "it is for tests",
}

func goTool(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v", strings.Join(args, " "), err)
	}
	return string(out)
}

func TestDependencies(t *testing.T) {
	t.Parallel()
	for dep := range strings.FieldsSeq(goTool(t, "list", "-deps", ".")) {
		for ban, reason := range banned {
			if dep == strings.TrimSuffix(ban, "/") || strings.HasSuffix(ban, "/") && strings.HasPrefix(dep, ban) {
				t.Errorf("fetcher links %s: %s", dep, reason)
			}
		}
	}
}

// TestSize checks that the fetcher stays small. The test builds the program with the flags of the release.
func TestSize(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "fetcher")
	goTool(t, "build", "-trimpath", "-tags=grpcnotrace", "-ldflags", "-s -w", "-o", program, ".") // as in Makefile
	info, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	const bound = 25_250_000 // bytes; each node downloads the program in an image, which must stay below 30 MB
	if info.Size() >= bound {
		t.Errorf("fetcher has %d bytes; want less than %d", info.Size(), bound)
	}
}
