package main

import (
	"testing"

	"github.com/prebake/prebake/pkg/testkit/importrule"
)

// TestDependencies checks the import rules that the compiler does not enforce.
func TestDependencies(t *testing.T) {
	t.Parallel()
	importrule.CheckBanned(t, map[string]string{
		"github.com/prebake/prebake/builder": "the server must not compile or sign: it has no toolchain " +
			"and no key",
		"github.com/prebake/prebake/fetcher": "nodes talk to the server, not the other way",
		"github.com/prebake/prebake/pkg/vm":  "test machines belong to builders",
		"github.com/sigstore/sigstore/pkg/signature/kms": "no private key may come near the process that is reachable from " +
			"the network",
		// Package testing is allowed, because the timestamp library of pkg/trust imports it.
		"github.com/prebake/prebake/pkg/testkit": "test helpers do not ship",
		"net/http/httptest":                      "test helpers do not ship",
	})
}

// TestHomes checks that each of these large libraries is imported by one package only.
func TestHomes(t *testing.T) {
	t.Parallel()
	importrule.CheckOwners(t, "github.com/prebake/prebake/server", []importrule.Owner{
		{Lib: "github.com/pressly/goose/v3", Package: "/internal/store", Reason: "SQL lives in store"},
		{Lib: "github.com/go-chi/chi/v5", Package: "/internal/httpapi", Reason: "routing lives in httpapi"},
		{Lib: "github.com/riverqueue/river", Reason: "the queue lives in pkg/queue"},
		{Lib: "cuelabs.dev/go/oci/ociregistry", Package: "/internal/ocistore", Reason: "the registry lives in ocistore"},
	})
}
