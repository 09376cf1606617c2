package main

import (
	"flag"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/clidoc"
)

var writePage = flag.Bool("write-page", false, "write docs/reference/builder.md anew")

// TestReference checks that the page in docs has the same content as --help.
func TestReference(t *testing.T) {
	t.Parallel()
	clidoc.Check(t, "../docs/reference/builder.md", *writePage, root)
}
