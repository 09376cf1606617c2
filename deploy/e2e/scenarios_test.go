package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/prebake/prebake/deploy/internal/testbed"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/vm"
)

// scenariosEnv is the environment variable that asks for TestNodeScenarios.
const scenariosEnv = "PREBAKE_SCENARIOS"

// TestNodeScenarios runs testdata/*.txtar. Each file runs on one virtual node, with the emulated GPU and NVIDIA's real
// driver. Each section of a file is a scenario; the node keeps its state between them. If the install folder is on a
// disk, the node may die and boot again.
//
//	fetcher ARGUMENT... => STATUS   run the fetcher, and expect this exit status
//	sh COMMAND => STATUS            run a shell command
//	insmod FILE                     load a module directly
//	background NAME COMMAND         start a command that keeps running; stop NAME ends it
//	stdout TEXT, stderr TEXT        the last command printed this; with ! before it, it did not
//	loaded MODULE...                these NVIDIA modules are in the kernel, and no others
//	boot [BUILD_ID]                 cut the power, unless the node has died already, and boot again; with BUILD_ID,
//	                                boot that COS build
//	=> dies                         in place of a status: the node dies during the command
//
// These variables are replaced: $SERVER, $AWAY (an address where nothing answers), $REPO, $OLD and $NEWER (driver
// versions), $PROPRIETARY, $OPEN and $OTHER (digests; $OTHER is for another kernel), $BUILD, $BEFORE (an earlier COS
// build), $TOKEN (the server's) and $DIR (the install folder).
//
// Each file takes minutes, so the test runs only if PREBAKE_SCENARIOS is set (`make scenarios`). TestScenarioScripts
// always checks the syntax of the files.
func TestNodeScenarios(t *testing.T) {
	if os.Getenv(scenariosEnv) == "" {
		t.Skip("PREBAKE_SCENARIOS is not set; run make scenarios")
	}
	k := shared.kernel(1)
	port := shared.srv.Addr[strings.LastIndex(shared.srv.Addr, ":")+1:]
	repo := strings.Replace(shared.srv.Repository(), shared.srv.Addr, vm.HostAddress+":"+port, 1)
	before := shared.kernel(0) // built first, so that the later builds also publish deltas from it
	other := mustBuild(t, shared.srv, before, shared.driver(), target.Proprietary)
	proprietary := mustBuild(t, shared.srv, k, shared.driver(), target.Proprietary)
	open := mustBuild(t, shared.srv, k, shared.driver(), target.Open)
	if b := build(t, shared.srv, k, "535.999.99", target.Proprietary); b.State != api.Failed { // no bucket has this driver
		t.Fatalf("build %d is %s", b.ID, b.State)
	}
	words := strings.NewReplacer(
		"$SERVER", "http://"+vm.HostAddress+":"+port, "$AWAY", "http://"+vm.HostAddress+":9", "$REPO", repo, "$OLD",
		shared.driver(),
		"$PROPRIETARY", proprietary.Digest, "$OPEN", open.Digest,
		"$OTHER", other.Digest, "$DIR", testbed.InstallDir,
		"$NEWER", shared.mirror.Drivers[1].Version, "$BUILD", k.BuildID, "$BEFORE", before.BuildID, "$TOKEN",
		shared.srv.Token,
	)
	boot, err := shared.Boot(t.Context(), shared.mirror, k)
	if err != nil {
		t.Fatal(err)
	}
	node := testbed.Node{Kernel: k, Boot: boot, GPU: true, Key: shared.key + ".pub", Tools: []string{"/bin/sh"},
		Timeout: 40 * time.Minute}
	for _, name := range []string{"cat", "cp", "dd", "grep", "ln", "ls", "mkdir", "mount", "printf", "rm", "sleep",
		"sync"} {
		node.Tools = append(node.Tools, "/usr/bin/"+name)
	}
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, script := range scripts { // each script has a machine of its own
		t.Run(strings.TrimSuffix(filepath.Base(script), ".txtar"), func(t *testing.T) {
			raw, err := os.ReadFile(script)
			if err != nil {
				t.Fatal(err)
			}
			play, node := &play{t: t, words: words, boots: [][]vm.Step{nil}, builds: []string{k.BuildID},
				dies: map[string]bool{}}, node
			node.Files = []vm.File{{Name: "/etc/prebake/stranger.pem", Data: strangerKey(t), Mode: 0o644}}
			for _, f := range txtar.Parse(raw).Files {
				if path, ok := strings.CutPrefix(f.Name, "file "); ok {
					node.Files = append(node.Files, vm.File{Name: path, Data: []byte(words.Replace(string(f.Data))), Mode: 0o644})
					continue
				}
				play.scenario(f.Name, string(f.Data))
			}
			if len(play.boots) > 1 {
				node.Disk = play.disk()
			}
			play.run(node)
		})
	}
}

// TestScenarioScripts checks that each line of the scripts has a known word, and each command a status.
func TestScenarioScripts(t *testing.T) {
	t.Parallel()
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, script := range scripts {
		raw, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		p := &play{t: t, words: strings.NewReplacer(), boots: [][]vm.Step{nil}, builds: []string{""}, dies: map[string]bool{}}
		for _, f := range txtar.Parse(raw).Files {
			if !strings.HasPrefix(f.Name, "file ") {
				p.scenario(f.Name, string(f.Data))
			}
		}
		if p.count == 0 || len(p.wants) == 0 {
			t.Errorf("%s has %d steps and %d expectations; want both", script, p.count, len(p.wants))
		}
	}
}

// strangerKey returns a public key that no policy of the test trusts.
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

// play converts a script to the steps of a node, and collects the expectations of each step.
type play struct {
	t     *testing.T
	words *strings.Replacer
	// boots has the steps of each boot of the node. dies has the names of the steps during which the node must die.
	boots  [][]vm.Step
	builds []string // COS build of each boot
	dies   map[string]bool
	count  int
	wants  []expectation
}

// expectation is a condition that the result of one step must meet.
type expectation struct {
	where, step string
	check       func(vm.StepResult) string // returns "" if the expectation is met
}

func (p *play) scenario(name, text string) {
	last := ""
	add := func(step vm.Step) *vm.Step {
		step.Name, step.KeepGoing, step.Timeout = fmt.Sprintf("%d %s", p.count, name), true, 4*time.Minute
		p.count++
		steps := &p.boots[len(p.boots)-1]
		*steps, last = append(*steps, step), step.Name
		return &(*steps)[len(*steps)-1]
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
		expect := func(check func(vm.StepResult) string) { p.wants = append(p.wants, expectation{where, last, check}) }
		switch word {
		case "", "#":
		case "fetcher", "sh":
			command, status, _ := strings.Cut(rest, " => ")
			argv := []string{"/bin/sh", "-c", command}
			if word == "fetcher" {
				argv = append([]string{"/usr/bin/fetcher"}, strings.Fields(command)...)
			}
			add(vm.Step{Argv: argv})
			code, err := strconv.Atoi(status)
			switch {
			case status == "dies":
				p.dies[last] = true
			case err != nil:
				p.t.Fatalf("%s: want => STATUS", where)
			default:
				expect(func(r vm.StepResult) string {
					if r.ExitCode != code {
						return fmt.Sprintf("ended with status %d %s; want %d", r.ExitCode, r.Error, code)
					}
					return ""
				})
			}
		case "boot":
			if steps := p.boots[len(p.boots)-1]; len(steps) > 0 && !p.dies[steps[len(steps)-1].Name] {
				// The kernel restarts at once and writes no cached data to the disk, as in a power cut.
				add(vm.Step{Argv: []string{"/bin/sh", "-c", "echo b > /proc/sysrq-trigger; sleep 60"}})
				p.dies[last] = true
			}
			p.boots = append(p.boots, nil)
			p.builds = append(p.builds, cmp.Or(rest, p.builds[len(p.builds)-1]))
		case "background":
			as, command, _ := strings.Cut(rest, " ")
			add(vm.Step{Argv: []string{"/bin/sh", "-c", command}, Background: true}).Name = as
			add(vm.Step{Argv: []string{"/usr/bin/sleep", "1"}}) // waits until the command has begun
		case "insmod":
			add(vm.Step{Argv: append([]string{"@insmod"}, strings.Fields(rest)...)})
			expect(func(r vm.StepResult) string { return r.Error })
		case "stop":
			add(vm.Step{Argv: []string{"@stop", rest}})
		case "loaded":
			add(vm.Step{Argv: []string{"@cat", "/proc/modules"}})
			expect(func(r vm.StepResult) string {
				live, modules := testbed.Live(r.Stdout), strings.Fields(rest)
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
					return fmt.Sprintf("%s contains the text: %t; want %t", word, negated, !negated)
				}
				return ""
			})
		default:
			p.t.Fatalf("%s: no such word", where)
		}
	}
}

// disk makes an image with an empty file system for the install folder, and mounts it in each boot.
func (p *play) disk() string {
	image := filepath.Join(p.t.TempDir(), "disk.img")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(3<<30), f.Close())
	}
	if err != nil {
		p.t.Fatal(err)
	}
	if out, err := exec.CommandContext(p.t.Context(), "mke2fs", "-q", "-F", "-t", "ext4",
		image).CombinedOutput(); err != nil {
		p.t.Fatalf("make filesystem: %v: %s", err, out)
	}
	for i, steps := range p.boots {
		mount := vm.Step{Name: fmt.Sprintf("mount %d", i), Argv: []string{"@mount", "/dev/vda", testbed.InstallDir}}
		p.boots[i] = append([]vm.Step{mount}, steps...)
	}
	return image
}

// run boots the node once for each boot in the script, and checks the expectations.
func (p *play) run(node testbed.Node) {
	seen := map[string]vm.StepResult{}
	for i, steps := range p.boots {
		for _, b := range shared.mirror.Builds {
			if b.BuildID == p.builds[i] && b.BuildID != node.Kernel.BuildID {
				boot, err := shared.Boot(p.t.Context(), shared.mirror, b.Kernel)
				if err != nil {
					p.t.Fatal(err)
				}
				node.Kernel, node.Boot = b.Kernel, boot
			}
		}
		res, err := shared.RunNode(p.t.Context(), node, steps)
		if res == nil {
			p.t.Fatal(err)
		}
		for _, step := range res.Steps {
			seen[step.Name] = step
			p.t.Logf("%s: %.1f s", step.Name, step.Seconds)
		}
		last := steps[len(steps)-1].Name
		switch got, ran := seen[last]; {
		case p.dies[last] && ran && !got.Ended:
		case err != nil || p.dies[last]:
			p.t.Errorf("%s: the node did not die during this step, or died when it should not: %v", last, err)
		}
	}
	for _, w := range p.wants {
		r, ok := seen[w.step]
		if !ok {
			p.t.Errorf("%s: the node did not run this step", w.where)
			continue
		}
		if what := w.check(r); what != "" {
			p.t.Errorf("%s\n%s\nstdout:\n%s\nstderr:\n%s", w.where, what, r.Stdout, r.Stderr)
		}
	}
}
