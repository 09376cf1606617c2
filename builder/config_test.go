package main

import (
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/configcheck"
)

// TestConfigCheck checks that "config check" accepts the example file in docs, and that it reports mistakes in this
// file with their line and column.
func TestConfigCheck(t *testing.T) {
	t.Parallel()
	configcheck.Check(t, filepath.Join("..", "docs", "examples", "builder.yaml"), root, []configcheck.Row{
		{Name: "example"},
		{"unknown key", "concurency: 2\n", "",
			`LAST:1: found setting "concurency", which builder work does not have; the nearest is concurrency`},
		{"earlier name", "state: /x\n", "",
			`LAST:1: found setting "state", which builder work does not have; the nearest is state-dir`},
		{"twice", "grace: 1m\n", "", `LAST:1: found field "grace" twice; want it once`},
		{"wrong type", "concurrency: [2]", "concurrency: 2", "13:14: concurrency: found a list; want a number"},
		{"text for a list", "to: oci:x", "to:\n  - prebake.example.com:8440/prebake/driver",
			`6:5: to: found "oci:x"; want a list of texts`},
		{"out of range", "concurrency: 0", "concurrency: 2", "13:14: concurrency: concurrency 0: want a number from 1"},
		{"choice", "load-test: maybe", "load-test: require",
			`12:12: load-test: load-test "maybe": want auto, require or off`},
		{"its parser", "cache-size: lots", "cache-size: 30GiB", "10:13: cache-size: "},
		{"secret", "password: abc\n", "",
			"LAST:11: password: found a secret in a file that many may read; want what docker login stores"},
		{"password", "postgres://prebake:pw@db", "postgres://prebake@db", "4:8: queue: found a password in a URL"},
		{"both ways", "wish: wish.yaml\n", "", "LAST:1: wish: both --wish and --queue are given; give one of these"},
		{"half of two", "module-key: /x.key\n", "", "LAST:1: module-key: --module-key and --module-cert go together"},
		{"nothing beside", "google-modules: true\nbtf: true\n", "",
			"LAST+1:1: btf: --btf has no effect with --google-modules"},
		{"not a URL", "server: prebake", "server: http://prebake.example.com:8440",
			`3:1: server: server "prebake": want a URL; give a URL, such as`},
	})
}
