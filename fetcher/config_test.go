package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/configcheck"
)

// TestConfigCheck checks that the example file has no mistake. Then each row plants one mistake in the file: the check
// must report the mistake with its line and column.
func TestConfigCheck(t *testing.T) {
	t.Parallel()
	configcheck.Check(t, filepath.Join("..", "docs", "examples", "fetcher.yaml"), root, []configcheck.Row{
		{Name: "example"},
		{"unknown key", "drivers: R535\n", "",
			`LAST:1: found setting "drivers", which fetcher run does not have; the nearest is driver`},
		{"earlier name", "key: /x\n", "",
			`LAST:1: found setting "key", which fetcher run does not have; the nearest is public-key`},
		{"twice", "driver: R550\n", "", `LAST:1: found field "driver" twice; want it once`},
		{"wrong type", "report: yes", "report: true", `14:9: report: found "yes"; want true or false`},
		{"time", "wait-build: 15", "wait-build: 15m", `7:13: wait-build: found "15"; want a time, such as 90s, 15m or 2h`},
		{"its parser", "install-dir: here\n", "", `LAST:14: install-dir: folder "here": want an absolute path`},
		{"hours", "maintenance: night", "maintenance: 02:00-05:00", "11:14: maintenance: "},
		{"choice", "foreign: kill\n", "", `LAST:10: foreign: foreign "kill": want keep or replace`},
		{"load test", "load-test-policy: always", "load-test-policy: tested", "10:19: load-test-policy: "},
		{"password", "http://u:pw@prebake.example.com", "http://prebake.example.com",
			"5:9: server: found a password in a URL"},
		{"not a URL", "server: prebake", "server: http://prebake.example.com:8440",
			`5:1: server: server "prebake": want a URL`},
		{"driver", "driver: newest", "driver: R535", "6:1: driver: "},
		{"digest without a place", "driver: sha256:" + strings.Repeat("0", 64), "driver: R535",
			"6:1: driver: --driver with a digest needs the artifact's repository; set"},
		{"parameter", "  - nvidia", "  - nvidia.NVreg_EnableGpuFirmware=0",
			`12:1: module-param: module parameter "nvidia": want MODULE.KEY=VALUE`},
		{"taint without a node", "startup-taint: x\n", "", "LAST:1: startup-taint: --startup-taint needs the name of a node"},
		{"label without a node", "driver-label: true\n", "", "LAST:1: driver-label: --driver-label needs the name of a node"},
		{"a version for a GPU type", "driver: 535.261.03@NVIDIA_L4", "driver: R535", "6:1: driver: "},
		{"report without a token", "", "token-file: /etc/prebake/token\n",
			"14:1: report: --report needs a server, and a token of this node"},
		{"policy and keys", "policy: /x.yaml\n", "",
			"9:1: public-key: --policy and --public-key exclude each other; put the setting into the policy file"},
		{"half of an identity", "trusted-root: /x.json\n", "",
			"LAST:1: trusted-root: want both --trusted-root and a certificate identity, or neither"},
	})
}
