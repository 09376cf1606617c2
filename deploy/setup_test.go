package deploy_test

import (
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"mvdan.cc/sh/v3/syntax"

	"github.com/prebake/prebake/deploy/internal/page"
)

// makeCommands returns the commands that make would run for a target.
func makeCommands(t *testing.T, target string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "make", "--dry-run", target)
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make --dry-run %s: %v\n%s", target, err, out)
	}
	return string(out)
}

// setupGroups returns the groups of packages in setup.sh.
func setupGroups(t *testing.T) map[string][]string {
	t.Helper()
	groups := map[string][]string{}
	text := strings.ReplaceAll(read(t, "deploy/setup.sh"), "\\\n", " ")
	for _, m := range regexp.MustCompile(`(?m)^  \[([a-z0-9]+)\]="([^"]+)"$`).FindAllStringSubmatch(text, -1) {
		groups[m[1]] = strings.Fields(m[2])
	}
	if len(groups) < 8 {
		t.Fatalf("setup.sh has the groups %v; want 8", groups)
	}
	return groups
}

// TestSetupBeforePrograms checks that each target that runs a program of a Debian package first installs its group.
func TestSetupBeforePrograms(t *testing.T) {
	t.Parallel()
	setup := regexp.MustCompile(`(?m)^deploy/setup\.sh(.*)$`)
	found := map[string]int{}
	for _, m := range makeTarget.FindAllStringSubmatch(read(t, "Makefile"), -1) {
		commands := makeCommands(t, m[1])
		for _, row := range []struct{ pattern, group string }{
			{"CGO_ENABLED=1", "build"},  // gcc
			{"go generate", "test"},     // protoc
			{"run '^TestFaults", "run"}, // bubblewrap
			{"/deploy/bench", "run"},    // all of the builder's programs, and curl
			{"deploy/images.sh", "images"},
			{"-arm64 ./fetcher", "arm64"},
			{"-run '^TestClangKernel", "clang"},
		} {
			at := strings.Index(commands, row.pattern)
			if at < 0 {
				continue
			}
			found[row.pattern]++
			has := false
			for _, call := range setup.FindAllStringSubmatch(commands[:at], -1) {
				groups := strings.Fields(call[1])
				all := len(groups) == 0 && !slices.Contains([]string{"clang", "arm64", "release"}, row.group)
				has = has || all || slices.Contains(groups, row.group)
			}
			if !has {
				t.Errorf("make %s runs %q before deploy/setup.sh installs the group %s", m[1], row.pattern, row.group)
			}
		}
	}
	if len(found) != 7 {
		t.Errorf("the targets run %v; want each of the 7 programs", found)
	}
}

// commandsOf returns the names of the programs that a script calls.
func commandsOf(t *testing.T, script string) (names []string) {
	t.Helper()
	file, err := syntax.NewParser().Parse(strings.NewReader(script), "")
	if err != nil {
		t.Fatalf("%v in %s", err, script)
	}
	syntax.Walk(file, func(n syntax.Node) bool {
		if call, ok := n.(*syntax.CallExpr); ok && len(call.Args) > 0 {
			names = append(names, literal(call.Args[0]))
		}
		return true
	})
	return names
}

// everywhere are commands of bash, and of packages that each Debian machine has (Essential or Priority: required).
var everywhere = strings.Fields("awk base64 cat cd echo export false mkdir set sha256sum sleep tar tee true wait")

// TestSetupHasProgramsOfBench checks that the packages for make bench have the programs of its scripts.
func TestSetupHasProgramsOfBench(t *testing.T) {
	t.Parallel()
	m := regexp.MustCompile(`(?s)"(\(mkdir .*?)\\n",`).FindStringSubmatch(read(t, "deploy/bench/fetch.go"))
	if m == nil {
		t.Fatal("deploy/bench/fetch.go has no script that begins with mkdir")
	}
	script := regexp.MustCompile(`"\+\s+"`).ReplaceAllString(m[1], "")
	script = regexp.MustCompile(`%\[\d\][sd]`).ReplaceAllString(script, "x")
	run := setupGroups(t)["run"]
	names := commandsOf(t, script)
	for _, name := range names {
		if !slices.Contains(everywhere, name) && !slices.Contains(run, name) {
			t.Errorf("make bench runs %s, and the group run of setup.sh has no package of this name: %v", name, run)
		}
	}
	if !slices.Contains(names, "zstd") {
		t.Errorf("the script calls %v; want zstd among them: does the test read it?", names)
	}
}

// TestTutorialListsPrograms checks that the tutorial for GKE lists each program that its blocks call, except those that
// its blocks install.
func TestTutorialListsPrograms(t *testing.T) {
	t.Parallel()
	const name = "docs/tutorials/first-node-pool.md"
	text := read(t, name)
	_, list, _ := strings.Cut(text, "\nYou need:\n")
	list, _, _ = strings.Cut(list, "\n## ")
	checked := 0
	for _, b := range page.Parse([]byte(text)).Blocks {
		if b.Language != "sh" {
			continue
		}
		for _, m := range regexp.MustCompile(`apt-get install -y (.*)`).FindAllStringSubmatch(b.Text, -1) {
			list += " " + m[1]
		}
		for _, command := range commandsOf(t, b.Text) {
			checked++
			if path.Dir(command) == "." && !slices.Contains(everywhere, command) &&
				!regexp.MustCompile(`\b`+regexp.QuoteMeta(command)+`\b`).MatchString(list) {
				t.Errorf("%s:%d calls %s, which is not in the list of what the reader needs", name, b.Line, command)
			}
		}
	}
	if checked < 20 {
		t.Errorf("%d calls were checked; want 20 or more", checked)
	}
}

// TestSetup checks which packages make installs for a target. The demo uses no database, no browser and no npm
// registry, so a first run must not need them. The tests use everything.
func TestSetup(t *testing.T) {
	t.Parallel()
	const everything, modules = "deploy/setup.sh\n", "deploy/browser/modules.sh"
	for _, row := range []struct {
		target     string
		want, deny []string
	}{
		{"demo", []string{"deploy/setup.sh build run\n"}, []string{everything, modules}},
		{"test", []string{everything, modules}, nil},
	} {
		out := makeCommands(t, row.target)
		for _, command := range row.want {
			if !strings.Contains(out, command) {
				t.Errorf("make %s does not run %q", row.target, command)
			}
		}
		for _, command := range row.deny {
			if strings.Contains(out, command) {
				t.Errorf("make %s runs %q; want only what it needs", row.target, command)
			}
		}
	}
}
