package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/fault"
)

// TestFlagsBeforeRequests gives commands wrong flags and a server that does not answer. The error must be about the
// flags.
func TestFlagsBeforeRequests(t *testing.T) {
	t.Parallel()
	const away = "http://127.0.0.1:1"
	absent := filepath.Join(t.TempDir(), "absent.tar")
	for _, row := range []struct {
		args []string
		code int
		err  string
	}{
		{[]string{"retry", "--class", "Tranzient"}, 2, "write --class transient"},
		{[]string{"retry", "--flavour", "sweet"}, 2, "want proprietary or open"},
		{[]string{"retry", "--class", "transient"}, fault.Transient.ExitCode(), "check that the server runs"},
		// A newer builder may have reported a class that this program does not know, so the command must ask the server.
		{[]string{"retry", "--class", "new-trouble"}, fault.Transient.ExitCode(), "check that the server runs"},
		{[]string{"reindex", "--public-key", "testdata/bucket.pub", "--bucket", "nonsense"}, 2, "write the bucket as"},
		{[]string{"import", absent, "--public-key", "testdata/bucket.pub", "--repository", "registry.example/x"}, 2,
			"want a repository of this server"},
	} {
		code, out, errs := run(t, append(row.args, "--server", away)...)
		if code != row.code || out != "" || !strings.Contains(errs, row.err) {
			t.Errorf("%v = %d\n%s%s\nwant %d with %q, and nothing on stdout", row.args, code, out, errs, row.code, row.err)
		}
	}
}
