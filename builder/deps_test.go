package main

import (
	"testing"

	"github.com/prebake/prebake/pkg/testkit/importrule"
)

// TestDependencies checks the import rules that the compiler does not enforce.
func TestDependencies(t *testing.T) {
	t.Parallel()
	importrule.CheckBanned(t, map[string]string{
		"github.com/prebake/prebake/server":  "builders talk to the server over HTTP and the queue",
		"github.com/prebake/prebake/fetcher": "a node runs the builder, not the other way",
		"github.com/go-chi/chi/v5": "a builder serves nothing but its metrics: nobody may reach the signing " +
			"key over the network",
		"github.com/danielgtaylor/huma/v2":       "as above",
		"cuelabs.dev/go/oci/ociregistry":         "the registry is the server's",
		"github.com/prebake/prebake/pkg/testkit": "test helpers do not ship",
		"github.com/prebake/prebake/deploy":      "what lays out Debian's packages is no part of the product",
	})
}

// TestHomes checks that each heavy library is imported by one package only.
func TestHomes(t *testing.T) {
	t.Parallel()
	importrule.CheckOwners(t, "github.com/prebake/prebake/builder", []importrule.Owner{
		{Lib: "github.com/prebake/prebake/pkg/queue", Package: "/internal/worker",
			Reason: "only worker takes builds from the queue"},
		{Lib: "github.com/sigstore/sigstore", Package: "/internal/sign", Reason: "private keys live in sign"},
		{Lib: "github.com/sigstore/sigstore-go", Package: "/internal/sign", Reason: "private keys live in sign"},
		{Lib: "go.opentelemetry.io/otel", Package: "/internal/telemetry",
			Reason: "what leaves a builder is decided in one place"},
		{Lib: "github.com/prometheus/client_golang", Package: "/internal/telemetry", Reason: "as above"},
		{Lib: "github.com/riverqueue/river", Reason: "the queue lives in pkg/queue"},
	})
}
