package main

import (
	"flag"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/clidoc"
)

var writePage = flag.Bool("write-page", false, "write docs/reference/server.md anew")

// TestReference compares the page in docs with the output of --help.
func TestReference(t *testing.T) {
	t.Parallel()
	clidoc.Check(t, "../docs/reference/server.md", *writePage, program)
}
