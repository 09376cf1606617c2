package main

import (
	"flag"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/clidoc"
)

var writePage = flag.Bool("write-page", false, "write docs/reference/fetcher.md anew")

// TestReference checks that the page in docs has the same text as --help.
func TestReference(t *testing.T) {
	t.Parallel()
	clidoc.Check(t, "../docs/reference/fetcher.md", *writePage, root)
}
