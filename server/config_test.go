package main

import (
	"path/filepath"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/configcheck"
)

// TestConfigCheck checks that the example file has no mistake. Then each row plants one mistake in the file: the check
// must report the mistake with its line and column.
func TestConfigCheck(t *testing.T) {
	t.Parallel()
	configcheck.Check(t, filepath.Join("..", "docs", "examples", "server.yaml"), program, []configcheck.Row{
		{Name: "example"},
		{"unknown key", "listn: :80\n", "",
			`LAST:1: found setting "listn", which server serve does not have; the nearest is listen`},
		{"twice", "data: /x\n", "", `LAST:1: found field "data" twice; want it once`},
		{"wrong type", "reserve: much", "reserve: 4096", `11:10: reserve: found "much"; want a number`},
		{"out of range", "reserve: -1", "reserve: 4096", "11:10: reserve: reserve -1: want a number from 0"},
		{"its parser", "listen: 8440", "listen: 0.0.0.0:8440", `4:9: listen: listen "8440": want HOST:PORT, or :PORT`},
		{"database", "database: mysql://db\n", "", "LAST:11: database: database: want sqlite:///PATH or postgres://…"},
		{"time", "discover-interval: 15", "discover-interval: 15m", `7:20: discover-interval: found "15"; want a time`},
		{"choice", "redistribute: most\n", "", `LAST:15: redistribute: redistribute "most": want none, userspace or all`},
		{"secret", "token: abc\n", "", "LAST:8: token: found a secret in a file that many may read; want token-file"},
		{"password", "queue: postgres://u:pw@db/x\n", "",
			"LAST:8: queue: found a password in a URL; want it in the environment"},
		{"half of two", "tls-cert: /x.pem\n", "",
			"LAST:1: tls-cert: only one of the flags --tls-cert and --tls-key is given; give both flags, or neither"},
		{"pattern", "create-only: [\"[\"]", `create-only: ["prebake/*", "prebake/*/*"]`,
			`8:1: create-only: --create-only "[": syntax error`},
	})
}
