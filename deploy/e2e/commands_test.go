package e2e

import (
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// shownCommand matches a command on a page.
var shownCommand = regexp.MustCompile(`(?s)aria-label="Command: [^"]*">(.*?)</pre>`)

// commandsOf returns the commands that a cell's page shows to a reader who calls the server by the name host.
func commandsOf(t *testing.T, srv *testbed.Server, host string, k target.Kernel, version string,
	f target.Flavour) []string {
	t.Helper()
	url := fmt.Sprintf("http://%s/cells/%s/%s/%s/%s", srv.Addr, k.Board, k.BuildID, version, f)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	page, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s = %s, %v", url, resp.Status, err)
	}
	var all []string
	for _, m := range shownCommand.FindAllSubmatch(page, -1) {
		all = append(all, html.UnescapeString(string(m[1])))
	}
	return all
}

// TestCommandsOfPages checks that the commands on a cell's page work when they are pasted into a shell. They need the
// public key and a token in the current folder. The command for a node is part of TestReleaseToNode.
func TestCommandsOfPages(t *testing.T) {
	t.Parallel()
	if shared.passes.remembered(t, "builder", "server", "fetcher", "deploy/tool.sh") {
		return
	}
	defer shared.turns.take(15)()
	k, driver := shared.kernel(0), shared.driver()
	mustBuild(t, shared.srv, k, driver, target.Open)
	dir := t.TempDir()
	copyTo(t, filepath.Join(dir, "prebake.key.pub"), shared.key+".pub")
	if err := os.WriteFile(filepath.Join(dir, "prebake.token"), []byte(shared.srv.Token), 0o600); err != nil {
		t.Fatal(err)
	}
	bin, err := filepath.Abs(shared.Bin)
	if err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "PATH="+bin+":"+stockTools(t)+":"+os.Getenv("PATH"), "HOME="+dir)
	var programs []string
	run := func(command string, status int) {
		t.Helper()
		name, _, _ := strings.Cut(command, " ")
		programs = append(programs, name)
		cmd := exec.CommandContext(t.Context(), "bash", "-c", command)
		cmd.Dir, cmd.Env = dir, env
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != status {
			t.Errorf("%s: %v; want exit status %d\n%s", command, err, status, out)
		}
	}
	for _, command := range commandsOf(t, shared.srv, shared.srv.Addr, k, driver, target.Open) {
		if !strings.HasPrefix(command, "fetcher install") {
			run(command, 0)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "driver.tar")); err != nil || info.Size() < 1<<20 {
		t.Errorf("the download is %v, %v; want a driver", info, err)
	}

	// The commands on this page request a cell that nobody has requested before. Its driver does not exist, so the test
	// cancels the build.
	for _, command := range commandsOf(t, shared.srv, shared.srv.Addr, k, "999.99.99", target.Open) {
		run(command, 0)
	}
	all, err := shared.srv.Client.Builds(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if b.Driver.Version == "999.99.99" {
			if _, err := shared.srv.Client.Cancel(t.Context(), b.ID); err != nil && !fault.Is(err, fault.Mismatch) {
				t.Errorf("cancel build %d: %v", b.ID, err)
			}
		}
	}
	slices.Sort(programs)
	if got := strings.Join(slices.Compact(programs), " "); got != "cosign crane fetcher server" {
		t.Errorf("the pages show commands of %s; want cosign, crane, fetcher and server", got)
	}
}

// nodeCommand returns the command for a node on a cell's page. The node has no shell that would find the program.
func nodeCommand(t *testing.T, k target.Kernel, version string, f target.Flavour) []string {
	t.Helper()
	host := vm.HostAddress + shared.srv.Addr[strings.LastIndex(shared.srv.Addr, ":"):]
	for _, command := range commandsOf(t, shared.srv, host, k, version, f) {
		if args, ok := strings.CutPrefix(command, "fetcher "); ok && strings.HasPrefix(args, "install") {
			return append([]string{"/usr/bin/fetcher"}, strings.Fields(args)...)
		}
	}
	t.Fatalf("the page of %s %s-%s shows no command for nodes", k, version, f)
	return nil
}
