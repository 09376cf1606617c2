package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestDependencies keeps the walls up that the compiler does not.
func TestDependencies(t *testing.T) {
	t.Parallel()
	bans := map[string]string{
		"github.com/prebake/prebake/builder":             "the server must not compile or sign: it has no toolchain and no key",
		"github.com/prebake/prebake/fetcher":             "nodes talk to the server, not the other way",
		"github.com/prebake/prebake/pkg/vm":              "test machines belong to builders",
		"github.com/sigstore/sigstore/pkg/signature/kms": "no private key may come near the process that is reachable from the network",
		"testing": "test helpers do not ship",
	}
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for _, dep := range strings.Fields(string(out)) {
		for ban, why := range bans {
			if dep == ban || strings.HasPrefix(dep, ban+"/") {
				if ban == "testing" && dep != "testing" {
					continue // testing/... holds small helpers that libraries use
				}
				t.Errorf("the server links %s: %s", dep, why)
			}
		}
	}
}

// TestHomes keeps one home for each heavy library.
func TestHomes(t *testing.T) {
	t.Parallel()
	const own = "github.com/prebake/prebake/server"
	homes := []struct{ lib, home, why string }{
		{"github.com/pressly/goose/v3", "/internal/store", "SQL lives in store"},
		{"github.com/go-chi/chi/v5", "/internal/httpapi", "routing lives in httpapi"},
		{"github.com/riverqueue/river", "", "the queue lives in pkg/queue"},
		{"cuelabs.dev/go/oci/ociregistry", "/internal/ocistore", "the registry lives in ocistore"},
	}
	out, err := exec.CommandContext(t.Context(), "go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		for _, h := range homes {
			for _, imported := range fields[1:] {
				is := imported == h.lib || strings.HasPrefix(imported, h.lib+"/")
				if is && (h.home == "" || fields[0] != own+h.home) {
					t.Errorf("%s imports %s: %s", fields[0], imported, h.why)
				}
			}
		}
	}
}
