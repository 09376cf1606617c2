package main

import (
	"flag"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/clidoc"
)

var writePage = flag.Bool("write-page", false, "write docs/reference/mirror.md anew")

// TestReference checks that the page in docs equals the output of --help.
func TestReference(t *testing.T) {
	t.Parallel()
	clidoc.Check(t, "../../docs/reference/mirror.md", *writePage, root)
}
