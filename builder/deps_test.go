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
		"github.com/prebake/prebake/server":      "builders talk to the server over HTTP and the queue",
		"github.com/prebake/prebake/fetcher":     "a node runs the builder, not the other way",
		"github.com/go-chi/chi/v5":               "a builder serves nothing: nobody may reach the signing key over the network",
		"github.com/danielgtaylor/huma/v2":       "as above",
		"cuelabs.dev/go/oci/ociregistry":         "the registry is the server's",
		"github.com/prebake/prebake/pkg/testkit": "test helpers do not ship",
	}
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		for ban, why := range bans {
			if dep == ban || strings.HasPrefix(dep, ban+"/") {
				t.Errorf("the builder links %s: %s", dep, why)
			}
		}
	}
}

// TestHomes keeps one home for each heavy library.
func TestHomes(t *testing.T) {
	t.Parallel()
	const own = "github.com/prebake/prebake/builder"
	homes := []struct{ lib, home, why string }{
		{"github.com/prebake/prebake/pkg/queue", "/internal/worker", "only worker takes builds from the queue"},
		{"github.com/sigstore/sigstore", "/internal/sign", "private keys live in sign"},
		{"github.com/sigstore/sigstore-go", "/internal/sign", "private keys live in sign"},
		{"github.com/riverqueue/river", "", "the queue lives in pkg/queue"},
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
