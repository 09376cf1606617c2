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
		"github.com/prebake/prebake/fetcher": "the fetcher may start the builder; the builder does not use the fetcher",
		"github.com/go-chi/chi/v5": "a builder serves nothing but its metrics: nobody may reach the signing " +
			"key over the network",
		"github.com/danielgtaylor/huma/v2":       "a builder has no API of its own",
		"cuelabs.dev/go/oci/ociregistry":         "only the server contains a registry",
		"github.com/prebake/prebake/pkg/testkit": "test helpers do not ship",
		"github.com/prebake/prebake/deploy":      "the programs in deploy are for demos and tests, and do not ship",
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
			Reason: "only telemetry sends traces"},
		{Lib: "github.com/prometheus/client_golang", Package: "/internal/telemetry", Reason: "only telemetry serves metrics"},
		{Lib: "github.com/riverqueue/river", Reason: "the queue lives in pkg/queue"},
	})
}
