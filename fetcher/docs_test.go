package main

import (
	"flag"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/cli"
)

var rewrite = flag.Bool("update", false, "write the pages in docs that come of the commands anew")

// TestDocs checks that the generated pages in docs match the fetcher's commands and flags.
func TestDocs(t *testing.T) {
	t.Parallel()
	if err := cli.CompareDocs(filepath.Join("..", "docs"), root, *rewrite); err != nil {
		t.Error(err)
	}
}
