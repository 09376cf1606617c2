package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/script"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"server": main})
}

// TestScript runs the commands as people and CI pipelines do. Each script has its own server, whose address and token
// are in PREBAKE_SERVER and PREBAKE_TOKEN. Scripts have these additional commands:
//
//	reports ID JSON      sends a builder's report of a build
//	publishes ID NAME    pushes an image, and reports the build as published with it; sets
//	                     the variable NAME to the image's digest
//	discovered N         waits until the server knows N drivers: its mirror has two
//	narrow               checks that stdout is no wider than a terminal
//	exits STATUS PROGRAM…  runs a program, and checks its exit status
func TestScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("testdata", "script"),
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			mirror := filepath.Join(env.WorkDir, "drivers")
			if err := os.MkdirAll(mirror, 0o755); err != nil {
				return err
			}
			for _, version := range []string{"535.261.03", "550.54.15"} {
				name := filepath.Join(mirror, "NVIDIA-Linux-x86_64-"+version+".run")
				if err := os.WriteFile(name, nil, 0o600); err != nil {
					return err
				}
			}
			url, _, _ := start(t, filepath.Join(env.WorkDir, "state"), "--token", scriptToken, "--driver-mirror",
				"file://"+mirror)
			env.Setenv("PREBAKE_SERVER", url)
			env.Setenv("PREBAKE_TOKEN", scriptToken)
			env.Setenv("TZ", "UTC")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": script.Exits,
			"reports": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 2 {
					ts.Fatalf("usage: reports ID JSON")
				}
				var u api.BuildUpdate
				ts.Check(json.Unmarshal([]byte(args[1]), &u))
				update(t, ts, args[0], u)
			},
			"publishes": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 2 {
					ts.Fatalf("usage: publishes ID VARIABLE")
				}
				digest := push(t, ts.Getenv("PREBAKE_SERVER"), scriptToken, "test-"+args[0])
				kernel := target.Kernel{BuildID: "17800.66.78", Board: "lakitu", Release: "6.1.0-47-cos", Arch: target.AMD64}
				update(t, ts, args[0], api.BuildUpdate{State: api.Published, Digest: digest, Kernel: &kernel,
					Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("a", 64))})
				ts.Setenv(args[1], digest)
			},
			"discovered": func(ts *testscript.TestScript, neg bool, args []string) {
				tick := time.NewTicker(20 * time.Millisecond)
				defer tick.Stop()
				for range tick.C {
					all, err := api.NewClient(ts.Getenv("PREBAKE_SERVER"), "", nil).Drivers(t.Context())
					ts.Check(err)
					if strconv.Itoa(len(all)) == args[0] {
						return
					}
				}
			},
			"narrow": func(ts *testscript.TestScript, neg bool, args []string) {
				for line := range strings.Lines(ts.ReadFile("stdout")) {
					if n := len([]rune(strings.TrimRight(line, "\n"))); n > columns {
						ts.Fatalf("a line has %d columns: %s", n, line)
					}
				}
			},
		},
	})
}

const scriptToken = "0123456789abcdef"

func update(t *testing.T, ts *testscript.TestScript, id string, u api.BuildUpdate) {
	t.Helper()
	n, err := strconv.ParseInt(id, 10, 64)
	ts.Check(err)
	_, err = api.NewClient(ts.Getenv("PREBAKE_SERVER"), scriptToken, nil).UpdateBuild(t.Context(), n, u)
	ts.Check(err)
}
