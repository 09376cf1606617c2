package main

import (
	"flag"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/clidoc"
)

var writePage = flag.Bool("write-page", false, "write docs/reference/builder.md anew")

// The page in docs is what --help says.
func TestReference(t *testing.T) {
	t.Parallel()
	clidoc.Check(t, "../docs/reference/builder.md", *writePage, root)
}
