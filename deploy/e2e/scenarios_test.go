package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/prebake/prebake/deploy/internal/scene"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// TestNodeScenarios plays testdata/node.txtar on one virtual node with the emulated GPU and
// NVIDIA's real driver: each section is a scenario, and the node goes from one to the next.
//
//	fetcher ARGUMENT... => STATUS   runs the agent, and wants this exit status
//	sh COMMAND => STATUS            runs a shell command
//	insmod FILE                     loads a module as anybody would
//	background NAME COMMAND         starts one that goes on; stop NAME ends it
//	stdout TEXT, stderr TEXT        the last one printed this; with ! it did not
//	loaded MODULE...                these NVIDIA modules are in the kernel, and no others
//
// $SERVER, $REPO, $OLD, $PROPRIETARY, $OPEN (digests), $OTHER (of another kernel) and $DIR
// (the install folder) stand for what they are called.
//
// The machine is emulated, and reads the whole driver for each load: it takes a quarter of an
// hour, and runs with PREBAKE_SCENARIOS alone (make scenarios).
func TestNodeScenarios(t *testing.T) {
	if os.Getenv("PREBAKE_SCENARIOS") == "" {
		t.Skip("PREBAKE_SCENARIOS is not set; run make scenarios")
	}
	k := shared.kernel(1)
	port := shared.srv.Addr[strings.LastIndex(shared.srv.Addr, ":")+1:]
	repo := strings.Replace(shared.srv.Repository(), shared.srv.Addr, vm.HostAddress+":"+port, 1)
	proprietary := published(t, shared.srv, k, shared.driver(), target.Proprietary)
	open := published(t, shared.srv, k, shared.driver(), target.Open)
	words := strings.NewReplacer(
		"$SERVER", "http://"+vm.HostAddress+":"+port, "$REPO", repo, "$OLD", shared.driver(), "$PROPRIETARY", proprietary.Digest, "$OPEN", open.Digest,
		"$OTHER", published(t, shared.srv, shared.kernel(0), shared.driver(), target.Proprietary).Digest, "$DIR", scene.InstallDir,
	)
	boot, err := shared.Boot(t.Context(), shared.mirror, k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile("testdata/node.txtar")
	if err != nil {
		t.Fatal(err)
	}
	script := txtar.Parse(raw)
	play := &play{t: t, words: words}
	files := []vm.File{{Name: "/etc/prebake/stranger.pem", Data: strangerKey(t), Mode: 0o644}}
	for _, f := range script.Files {
		if path, ok := strings.CutPrefix(f.Name, "file "); ok {
			files = append(files, vm.File{Name: path, Data: []byte(words.Replace(string(f.Data))), Mode: 0o644})
			continue
		}
		play.scenario(f.Name, string(f.Data))
	}
	tools := []string{"/bin/sh"}
	for _, name := range []string{"cat", "cp", "dd", "ls", "mkdir", "printf", "rm", "sleep"} {
		tools = append(tools, "/usr/bin/"+name)
	}
	res, err := shared.RunNode(t.Context(), scene.Node{Kernel: k, Boot: boot, GPU: true, Key: shared.key + ".pub", Files: files, Tools: tools, Timeout: 40 * time.Minute}, play.steps)
	if err != nil {
		t.Fatal(err)
	}
	play.judge(res)
}

// strangerKey is a public key that nobody here trusts.
func strangerKey(t *testing.T) []byte {
	t.Helper()
	key := filepath.Join(t.TempDir(), "stranger.key")
	if _, err := shared.Must(t.Context(), "builder", "keygen", key); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return pem
}

// play is a script on its way to steps, and what is wanted of each.
type play struct {
	t     *testing.T
	words *strings.Replacer
	steps []vm.Step
	wants []want
}

// want is one expectation of a step.
type want struct {
	where, step string
	check       func(vm.StepResult) string // "" is fulfilled
}

func (p *play) scenario(name, text string) {
	last := ""
	add := func(step vm.Step) {
		step.Name, step.KeepGoing, step.Timeout = fmt.Sprintf("%d %s", len(p.steps), name), true, 4*time.Minute
		p.steps, last = append(p.steps, step), step.Name
	}
	number := 0
	for line := range strings.Lines(text) {
		number++
		line = p.words.Replace(strings.TrimSpace(line))
		where := fmt.Sprintf("%s, line %d: %s", name, number, line)
		word, rest, _ := strings.Cut(line, " ")
		negated := word == "!"
		if negated {
			word, rest, _ = strings.Cut(rest, " ")
		}
		expect := func(check func(vm.StepResult) string) { p.wants = append(p.wants, want{where, last, check}) }
		switch word {
		case "", "#":
		case "fetcher", "sh":
			command, status, ok := strings.Cut(rest, " => ")
			code, err := strconv.Atoi(status)
			if !ok || err != nil {
				p.t.Fatalf("%s: want => STATUS", where)
			}
			argv := []string{"/bin/sh", "-c", command}
			if word == "fetcher" {
				argv = append([]string{"/usr/bin/fetcher"}, strings.Fields(command)...)
			}
			add(vm.Step{Argv: argv})
			expect(func(r vm.StepResult) string {
				if r.ExitCode != code {
					return fmt.Sprintf("ended with status %d %s; want %d", r.ExitCode, r.Error, code)
				}
				return ""
			})
		case "background":
			as, command, _ := strings.Cut(rest, " ")
			add(vm.Step{Argv: []string{"/bin/sh", "-c", command}, Background: true})
			p.steps[len(p.steps)-1].Name = as
			add(vm.Step{Argv: []string{"/usr/bin/sleep", "1"}}) // until it has begun
		case "insmod":
			add(vm.Step{Argv: append([]string{"@insmod"}, strings.Fields(rest)...)})
			expect(func(r vm.StepResult) string { return r.Error })
		case "stop":
			add(vm.Step{Argv: []string{"@stop", rest}})
		case "loaded":
			add(vm.Step{Argv: []string{"@cat", "/proc/modules"}})
			expect(func(r vm.StepResult) string {
				live, modules := scene.Live(r.Stdout), strings.Fields(rest)
				slices.Sort(live)
				slices.Sort(modules)
				if !slices.Equal(live, modules) {
					return fmt.Sprintf("loaded are %v", live)
				}
				return ""
			})
		case "stdout", "stderr":
			expect(func(r vm.StepResult) string {
				out := r.Stdout
				if word == "stderr" {
					out = r.Stderr
				}
				if strings.Contains(string(out), rest) == negated {
					return "it printed something else"
				}
				return ""
			})
		default:
			p.t.Fatalf("%s: no such word", where)
		}
	}
}

func (p *play) judge(res *vm.Result) {
	for _, step := range res.Steps {
		p.t.Logf("%s: %.1f s", step.Name, step.Seconds)
	}
	for _, w := range p.wants {
		r, err := scene.StepNamed(res, w.step)
		if err != nil {
			p.t.Errorf("%s: %v", w.where, err)
			continue
		}
		if what := w.check(r); what != "" {
			p.t.Errorf("%s\n%s\nstdout:\n%s\nstderr:\n%s", w.where, what, r.Stdout, r.Stderr)
		}
	}
}
