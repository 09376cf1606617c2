package agent

import (
	"errors"
	"strings"
	"testing"

	"github.com/prebake/prebake/fetcher/internal/host"
	"github.com/prebake/prebake/fetcher/internal/install"
	"github.com/prebake/prebake/fetcher/internal/resolve"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/modinfo"
	"github.com/prebake/prebake/pkg/target"
)

// TestDecide checks what the agent does with the driver of a node: load, keep, replace or refuse. In the rows, 535.2+b
// is another build of version 535.2, with other bytes.
func TestDecide(t *testing.T) {
	t.Parallel()
	const here, elsewhere = "17800.0.47", "17800.0.50"
	away := fault.New(fault.Transient, "nobody answers", "")
	set := func(name, build string) *install.Set {
		if name == "" {
			return nil
		}
		version, bytes, _ := strings.Cut(name, "+")
		s := &install.Set{Digest: name, Kernel: target.Kernel{BuildID: build, Board: "lakitu", Release: "6.1"},
			Driver: target.Driver{Version: version, Flavour: target.Open}}
		for _, m := range []string{"nvidia", "nvidia-uvm"} {
			s.Modules = append(s.Modules,
				install.Module{Name: m, Version: s.Driver.Modules().Version, BuildID: bytes + "of " + s.Driver.Modules().Version})
		}
		return s
	}
	rows := []struct {
		name                      string
		loaded, current, previous string
		wanted                    string
		none                      error
		wish                      target.Wish
		change                    func(s *nodeState)

		do  kernelAction
		set string
		err string // words of the error; "" means no error
	}{
		{name: "a node without a driver", wanted: "535.2", do: load, set: "535.2"},
		{name: "the farm is away, nothing is here", none: away, do: refuse, err: "nobody answers"},
		{name: "installed and loaded", loaded: "535.2", current: "535.2", wanted: "535.2", do: keep, set: "535.2"},
		{name: "after a reboot", current: "535.2", wanted: "535.2", do: load, set: "535.2"},
		{name: "after a reboot, the farm is away", current: "535.2", none: away, do: load, set: "535.2",
			err: "nobody answers"},
		{name: "the farm is away", loaded: "535.2", current: "535.2", none: away, do: keep, set: "535.2",
			err: "nobody answers"},
		{name: "another version wanted, the farm is away", current: "535.2", none: away, wish: "550.1", do: load,
			set: "535.2", err: "nobody answers"},
		{name: "the node was updated, the farm is away", current: "535.2", none: away, do: refuse, err: "nobody answers",
			change: func(s *nodeState) { s.current.Kernel.BuildID = elsewhere }},
		{name: "the node was updated", current: "535.2", wanted: "535.2+new", do: load, set: "535.2+new",
			change: func(s *nodeState) { s.current.Kernel.BuildID = elsewhere }},
		{name: "upgrade", loaded: "535.2", current: "535.2", wanted: "535.3", do: replace, set: "535.3"},
		{name: "upgrade, a program uses the GPU", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep, set: "535.2",
			err:    "1 open device",
			change: func(s *nodeState) { s.facts.Modules[0].Refs = 1 }},
		{name: "upgrade, an optional module is being loaded", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep,
			set: "535.2", err: "still loading",
			change: func(s *nodeState) {
				s.facts.Modules = append(s.facts.Modules, host.Module{Name: "nvidia_drm", Changing: true})
			}},
		{name: "somebody else's driver is being unloaded", loaded: "570.1", wanted: "535.2", do: refuse,
			err:    "still loading or unloading module nvidia",
			change: func(s *nodeState) { s.replaceForeign, s.facts.Modules[0].Changing = true, true }},
		{name: "upgrade, gdrdrv holds the driver", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep, set: "535.2",
			err:    "kernel module gdrdrv",
			change: func(s *nodeState) { s.facts.Modules[1].UsedBy = []string{"gdrdrv"} }},
		{name: "upgrade, a kernel that unloads nothing", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep,
			set: "535.2", err: "never unloads",
			change: func(s *nodeState) { s.facts.Modules[0].Permanent = true }},
		{name: "upgrade, the kernel takes signed modules only", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep,
			set: "535.2", err: "enforces module signatures",
			change: func(s *nodeState) { s.facts.Policy.SignaturesEnforced = true }},
		{name: "downgrade", loaded: "535.3", current: "535.3", wanted: "535.2", do: keep, set: "535.3",
			err: "is older"},
		{name: "downgrade that is allowed", loaded: "535.3", current: "535.3", wanted: "535.2", do: replace, set: "535.2",
			change: func(s *nodeState) { s.allowDowngrade = true }},
		{name: "downgrade by its version", loaded: "535.3", current: "535.3", wanted: "535.2", wish: "535.2", do: replace,
			set: "535.2"},
		{name: "downgrade to another branch", loaded: "550.1", current: "550.1", wanted: "535.2", wish: "R535", do: replace,
			set: "535.2"},
		{name: "downgrade to another branch, as a GPU type's list has it", loaded: "550.1", current: "550.1",
			wanted: "535.2", wish: "R535@NVIDIA_L4", do: replace, set: "535.2"},
		{name: "downgrade to a GPU type's default", loaded: "535.3", current: "535.3", wanted: "535.2",
			wish: "default@NVIDIA_L4", do: keep, set: "535.3", err: "found for --driver default@NVIDIA_L4, is older"},
		{name: "other bytes of one version", loaded: "535.2", current: "535.2", wanted: "535.2+b", do: replace,
			set: "535.2+b"},
		{name: "other bytes of one version, in use", loaded: "535.2", current: "535.2", wanted: "535.2+b", do: keep,
			set: "535.2", err: "open device",
			change: func(s *nodeState) { s.facts.Modules[0].Refs = 1 }},
		{name: "an edition in place of its release", loaded: "535.2", current: "535.2", wanted: "535.2-grid",
			wish: "535.2-grid", do: replace, set: "535.2-grid"},
		{name: "somebody else's driver", loaded: "570.1", wanted: "535.2", do: refuse,
			err: "driver 570.1-open is loaded, which another installer"},
		{name: "somebody else's driver, the farm is away", loaded: "570.1", none: away, do: refuse, err: "nobody answers"},
		{name: "somebody else's driver in place of ours", loaded: "570.1", current: "535.2", wanted: "535.2", do: refuse,
			err: "driver 570.1-open is loaded, which another installer"},
		{name: "somebody else's driver, which may go", loaded: "570.1", wanted: "535.2", do: replace, set: "535.2",
			change: func(s *nodeState) { s.replaceForeign = true }},
		{name: "somebody else's driver is the one that is wanted", loaded: "535.2+theirs", wanted: "535.2", do: keep,
			set: "535.2"},
		{name: "ours of before is loaded", loaded: "535.2", current: "535.3", previous: "535.2", wanted: "535.3", do: replace,
			set: "535.3"},
		{name: "rolled back by hand", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep, set: "535.2",
			err:    "rolled back by hand",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{ByHand: true} }},
		{name: "rolled back by hand, and asked for again", loaded: "535.2", current: "535.2", wanted: "535.3", do: replace,
			set:    "535.3",
			change: func(s *nodeState) { s.attempts["535.3"], s.retry = &attempt{ByHand: true}, true }},
		{name: "rolled back by hand while in use, and the previous driver is wanted", loaded: "535.3", current: "535.3",
			previous: "535.2", wanted: "535.2", do: keep, set: "535.3", err: "open device",
			change: func(s *nodeState) { s.attempts["535.3"], s.facts.Modules[0].Refs = &attempt{ByHand: true}, 1 }},
		{name: "rolled back by hand, and the previous driver is wanted", loaded: "535.3", current: "535.3",
			previous: "535.2", wanted: "535.2", do: replace, set: "535.2",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{ByHand: true} }},
		{name: "failed once", loaded: "535.2", current: "535.2", wanted: "535.3", do: replace, set: "535.3",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{Failures: 1} }},
		{name: "failed twice", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep, set: "535.2",
			err:    "failed 2 times, the last time with: words",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{Failures: 2, Reason: "words"} }},
		{name: "failed twice, and there is nothing else", wanted: "535.3", do: load, set: "535.3",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{Failures: 2} }},
		{name: "took the node down twice, and there is nothing else", wanted: "535.3", do: refuse,
			err:    "took the node down 2 times",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{Crashes: 2} }},
		{name: "took the node down twice, and is active", current: "535.3", none: away, do: refuse, err: "nobody answers",
			change: func(s *nodeState) { s.attempts["535.3"] = &attempt{Crashes: 2} }},
		{name: "rolled back by hand, and then the node was updated", current: "535.2", wanted: "535.3", do: load,
			set:    "535.3",
			change: func(s *nodeState) { s.attempts["535.3"], s.current.Kernel.BuildID = &attempt{ByHand: true}, elsewhere }},
		{name: "failed twice, and then the node was updated", current: "535.2", wanted: "535.3", do: load, set: "535.3",
			change: func(s *nodeState) { s.attempts["535.3"], s.current.Kernel.BuildID = &attempt{Failures: 2}, elsewhere }},
		{name: "the node went back to the former build, the farm is away", current: "535.3", previous: "535.2", none: away,
			do: load, set: "535.2", err: "nobody answers",
			change: func(s *nodeState) { s.current.Kernel.BuildID = elsewhere }},
		{name: "ours, which is no longer active, is loaded", loaded: "535.1", current: "535.2", wanted: "535.3",
			do: replace, set: "535.3",
			change: func(s *nodeState) { s.staged = []*install.Set{set("535.1", here)} }},
		{name: "nothing is to be loaded", loaded: "535.2", current: "535.2", wanted: "535.3", do: keep, set: "535.3",
			change: func(s *nodeState) { s.noLoad, s.facts.Modules[0].Refs = true, 1 }},
	}
	for _, row := range rows {
		s := nodeState{
			facts:   &host.Facts{Kernel: set("x", here).Kernel},
			current: set(row.current, here), previous: set(row.previous, here), wanted: set(row.wanted, here), none: row.none,
			attempts: attempts{},
		}
		if row.wish == "" {
			row.wish = target.Default
		}
		s.question = resolve.Question{Kernel: s.facts.Kernel, Wish: row.wish, Flavour: resolve.Auto}
		if l := set(row.loaded, here); l != nil {
			s.facts.Driver = l.Driver
			for _, m := range l.Modules {
				s.facts.Modules = append(s.facts.Modules,
					host.Module{Name: modinfo.Canonical(m.Name), Version: m.Version, BuildID: m.BuildID})
			}
		}
		if row.change != nil {
			row.change(&s)
		}
		d := decide(s)
		got := ""
		if d.set != nil {
			got = d.set.Digest
		}
		if d.do != row.do || got != row.set || (d.err == nil) != (row.err == "") || d.err != nil &&
			!strings.Contains(d.err.Error(), row.err) {
			t.Errorf("%s: %s %q, %v; want %s %q, %q", row.name, d.do, got, d.err, row.do, row.set, row.err)
		}
		if d.err != nil && !errors.Is(d.err, away) && fault.Hint(d.err) == "" {
			t.Errorf("%s: %v has no next step", row.name, d.err)
		}
	}
}

// TestInUseText checks the text that says which programs use the driver. The agent compares this text with the former
// one, and sends the cluster an Event for each change. So the text must not change while the same programs use the GPU,
// and it has no process ids.
func TestInUseText(t *testing.T) {
	t.Parallel()
	user := func(pid int, command, pod string) host.User { return host.User{PID: pid, Command: command, Pod: pod} }
	for name, row := range map[string]struct {
		users []host.User
		want  string
	}{
		"nobody is known": {nil, "in use by 3 open devices"},
		"one program":     {[]host.User{user(812, "python3", "ml/train-0")}, "in use by python3 (pod ml/train-0)"},
		"one without pod": {[]host.User{user(7, "nvidia-smi", "")}, "in use by nvidia-smi"},
		"several, sorted": {
			[]host.User{
				user(1, "triton", ""), user(2, "python3", "ml/b"), user(3, "python3", "ml/a"), user(9, "python3", "ml/b"),
			},
			"in use by python3 (pod ml/a), python3 (pod ml/b, 2 processes), triton",
		},
		"the same in another order with other pids": {
			[]host.User{
				user(11, "python3", "ml/a"), user(12, "python3", "ml/b"), user(13, "python3", "ml/b"), user(14, "triton", ""),
			},
			"in use by python3 (pod ml/a), python3 (pod ml/b, 2 processes), triton",
		},
		"many": {
			[]host.User{
				user(1, "a", ""), user(2, "b", ""), user(3, "c", ""), user(4, "d", ""), user(5, "e", ""), user(6, "f", ""),
			},
			"in use by a, b, c, d and 2 more programs",
		},
	} {
		err := idle(&host.Facts{Users: row.users, Modules: []host.Module{{Name: "nvidia", Refs: 3}}})
		if !fault.Is(err, fault.Busy) || !strings.HasSuffix(err.Error(), "module nvidia is "+row.want) {
			t.Errorf("%s: idle = %v; want %q", name, err, row.want)
		}
	}
}
