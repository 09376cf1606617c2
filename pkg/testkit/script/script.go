// Package script has commands for the test scripts of several programs. Only test files import it.
package script

import (
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// Exits is a command for [testscript.Params.Cmds]. It runs a program and checks its exit status, for example: exits 16
// server resolve.
func Exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS PROGRAM [ARGUMENT...]")
	}
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		n, convErr := strconv.Atoi(strings.TrimPrefix(err.Error(), "exit status "))
		if convErr != nil {
			ts.Fatalf("%s: %v", args[1], err)
		}
		got = n
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("%s ended with status %d; want %s", strings.Join(args[1:], " "), got, args[0])
	}
}
