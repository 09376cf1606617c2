package main

import (
	"flag"
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/cli"
)

var rewrite = flag.Bool("update", false, "write the pages in docs that come of the commands anew")

// TestDocs checks that the pages in docs that are generated from the commands are up to date.
func TestDocs(t *testing.T) {
	t.Setenv("HOME", "/home/user") // the default values of some flags are folders below it
	t.Setenv("XDG_CACHE_HOME", "")
	if err := cli.CompareDocs(filepath.Join("..", "docs"), root, *rewrite); err != nil {
		t.Error(err)
	}
}
