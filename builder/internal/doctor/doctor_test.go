package doctor_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/testkit/installed"
	"github.com/prebake/prebake/pkg/vm"
)

// envBare is an environment variable. If it is set, this test program runs the checks of doctor and prints the report.
// TestBareMachine sets it.
const envBare = "PREBAKE_TEST_BARE"

func TestMain(m *testing.M) {
	if os.Getenv(envBare) != "" {
		r := doctor.Run(context.Background(),
			doctor.Config{Cache: "/tmp/cache", Need: 1 << 60, GuestInit: "/guestinit", NVMLProbe: "/nvmlprobe",
				Destinations: []string{"oci:/usr/x"}, Key: "/key", Mirrors: []string{"file:///nowhere"}},
			doctor.Real(licence.Rule{}, func(string) registry.Options { return registry.Options{} }))
		if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
			panic(err)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// healthyMachine returns a machine on which no check fails.
func healthyMachine() doctor.Machine {
	fine := func(context.Context, string) error { return nil }
	return doctor.Machine{
		Program:    func(string) bool { return true },
		Library:    func(string) bool { return true },
		Executable: func(string) error { return nil },
		Sandbox:    func(context.Context) error { return nil },
		Limits:     func() sandbox.LimitSupport { return sandbox.LimitSupport{ControlGroup: true} },
		Memory:     16 << 30, Processors: 4,
		Cache: func(string) (int64, error) { return 100 << 30, nil },
		Now:   func() time.Time { return time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC) }, Synchronised: true,
		Mirror: fine, Destination: fine, Key: fine,
		MayGo: func(context.Context, string, target.Flavour) error { return nil },
	}
}

func config() doctor.Config {
	return doctor.Config{Cache: "/cache", Need: 4 << 30, GuestInit: "/bin/guestinit", NVMLProbe: "/bin/nvmlprobe",
		Mirrors: []string{"gs://a", "gs://b"}, Destinations: []string{"here/driver"}, Key: "k"}
}

func TestHealthy(t *testing.T) {
	t.Parallel()
	r := doctor.Run(t.Context(), config(), healthyMachine())
	for _, f := range r.Findings {
		if f.Level != doctor.OK && f.Level != doctor.Note {
			t.Errorf("on a healthy machine: %+v", f)
		}
	}
	if len(r.Findings) != 16 || r.Install != "" || r.Err() != nil {
		t.Errorf("%d findings, install %q, %v; want 16, nothing to install, no error", len(r.Findings), r.Install, r.Err())
	}
}

// TestFindings checks that doctor reports each thing that a machine lacks, with the package to install or another
// remedy.
func TestFindings(t *testing.T) {
	t.Parallel()
	lacking := func(names ...string) func(string) bool {
		return func(n string) bool { return !slices.Contains(names, n) }
	}
	lackingFile := func(file string) func(*doctor.Machine, *doctor.Config) {
		return func(m *doctor.Machine, _ *doctor.Config) {
			m.Executable = func(path string) error {
				if path == file {
					return os.ErrNotExist
				}
				return nil
			}
		}
	}
	rows := []struct {
		name    string
		change  func(m *doctor.Machine, c *doctor.Config)
		check   string
		level   doctor.Level
		text    string
		next    string
		install string
		err     fault.Kind // 0 means no error
	}{
		{"no bubblewrap", func(m *doctor.Machine, _ *doctor.Config) { m.Program = lacking("bwrap") }, "sandbox", doctor.Fail,
			"bubblewrap is missing", "apt-get install bubblewrap", "apt-get install bubblewrap", fault.Usage},
		{"no namespaces", func(m *doctor.Machine, _ *doctor.Config) {
			m.Sandbox = func(context.Context) error {
				return fault.New(fault.Usage, "no permissions to create a new namespace", "sysctl -w x=1")
			}
		}, "sandbox", doctor.Fail, "no permissions", "sysctl -w x=1", "", fault.Usage},
		{"no make, no bc", func(m *doctor.Machine, _ *doctor.Config) { m.Program = lacking("make", "bc", "find") },
			"build tools", doctor.Fail, "bc, find, make", "apt-get install bc findutils make",
			"apt-get install bc findutils make", fault.Usage},
		{"no pahole", func(m *doctor.Machine, c *doctor.Config) { m.Program, c.BTF = lacking("pahole"), true }, "types",
			doctor.Fail, "no BTF can be made", "apt-get install dwarves", "apt-get install dwarves", fault.Usage},
		{"pahole", func(_ *doctor.Machine, c *doctor.Config) { c.BTF = true }, "types", doctor.OK, "pahole is installed", "",
			"", 0},
		{"no libelf", func(m *doctor.Machine, _ *doctor.Config) { m.Library = lacking("libelf.so.1") }, "build tools",
			doctor.Fail, "objtool", "libelf1", "apt-get install libelf1", fault.Usage},
		{"no control group", func(m *doctor.Machine, _ *doctor.Config) {
			m.Limits = func() sandbox.LimitSupport {
				return sandbox.LimitSupport{Reason: fault.New(fault.Unsupported, "it is shared", "Delegate=yes")}
			}
		}, "limits", doctor.Warn, "it is shared", "Delegate=yes", "", 0},
		{"little memory", func(m *doctor.Machine, _ *doctor.Config) { m.Memory = 2 << 30 }, "memory", doctor.Warn,
			"2.0 GiB for 4 jobs", "--jobs 2", "", 0},
		{"fewer jobs on it", func(m *doctor.Machine, c *doctor.Config) { m.Memory, c.Jobs = 2<<30, 2 }, "memory", doctor.OK,
			"2.0 GiB", "", "", 0},
		{"hardly any memory", func(m *doctor.Machine, _ *doctor.Config) { m.Memory = 500 << 20 }, "memory", doctor.Fail,
			"0.5 GiB", "at least 1 GiB", "", fault.OutOfMemory},
		{"full disk", func(m *doctor.Machine, _ *doctor.Config) {
			m.Cache = func(string) (int64, error) { return 3 << 30, nil }
		}, "cache", doctor.Fail, "3.0 GiB free; a build needs 4.0 GiB", "--cache", "", fault.DiskFull},
		{"small disk", func(m *doctor.Machine, _ *doctor.Config) {
			m.Cache = func(string) (int64, error) { return 15 << 30, nil }
		}, "cache", doctor.Warn, "15 GiB free", "--cache-size", "", 0},
		{"cache of another", func(m *doctor.Machine, _ *doctor.Config) {
			m.Cache = func(string) (int64, error) { return 0, os.ErrPermission }
		}, "cache", doctor.Fail, "permission denied", "--cache", "", fault.Internal},
		{"no emulator", func(m *doctor.Machine, _ *doctor.Config) { m.Program = lacking("qemu-system-aarch64") },
			"qemu arm64", doctor.Warn, "arm64 cannot be load-tested", "qemu-system-arm; ", "apt-get install qemu-system-arm", 0},
		{"no helper", lackingFile("/bin/nvmlprobe"), "nvmlprobe", doctor.Warn, "not exist", "--probe", "", 0},
		{"no helper for arm64", lackingFile("/bin/guestinit-arm64"), "qemu arm64", doctor.Warn, "cannot be load-tested",
			"put guestinit-arm64 beside guestinit (to compile guestinit-arm64: make arm64-programs)", "", 0},
		{"no probe for arm64", lackingFile("/bin/nvmlprobe-arm64"), "qemu arm64", doctor.Warn, "do not ask NVML",
			"put nvmlprobe-arm64 beside nvmlprobe (to compile nvmlprobe-arm64: make arm64-programs)", "", 0},
		{"old clock", func(m *doctor.Machine, _ *doctor.Config) {
			m.Now = func() time.Time { return time.Unix(0, 0) }
		}, "clock", doctor.Fail, "1970-01-01", "set the clock", "", fault.Usage},
		{"free clock", func(m *doctor.Machine, _ *doctor.Config) { m.Synchronised = false }, "clock", doctor.Note,
			"2026-12-01", "", "", 0},
		{"mirror away", func(m *doctor.Machine, _ *doctor.Config) {
			m.Mirror = func(_ context.Context, url string) error {
				if url == "gs://b" {
					return fault.New(fault.Transient, "gs://b: no route", "")
				}
				return nil
			}
		}, "mirror", doctor.Fail, "gs://b: no route", "check the URL", "", fault.Transient},
		{"may not push", func(m *doctor.Machine, _ *doctor.Config) {
			m.Destination = func(context.Context, string) error { return fault.New(fault.PublishRefused, "403", "docker login") }
		}, "destination", doctor.Fail, "403", "docker login", "", fault.PublishRefused},
		{"neither flavour may go", func(m *doctor.Machine, _ *doctor.Config) {
			m.MayGo = func(context.Context, string, target.Flavour) error {
				return fault.New(fault.PublishRefused, "public", "add --private")
			}
		}, "licence", doctor.Fail, "public", "add --private", "", fault.PublishRefused},
		{"proprietary modules may not go", func(m *doctor.Machine, _ *doctor.Config) {
			m.MayGo = func(_ context.Context, _ string, f target.Flavour) error {
				if f == target.Open {
					return nil
				}
				return fault.New(fault.PublishRefused, "proprietary", "add --private")
			}
		}, "licence", doctor.Warn, "proprietary", "add --private", "", 0},
		{"nobody knows whether they may go", func(m *doctor.Machine, _ *doctor.Config) {
			m.MayGo = func(context.Context, string, target.Flavour) error { return fault.New(fault.Transient, "no route", "") }
		}, "licence", doctor.Fail, "no route", "check the name", "", fault.Transient},
		{"no key", func(m *doctor.Machine, _ *doctor.Config) {
			m.Key = func(context.Context, string) error { return errors.New("no such file") }
		}, "key", doctor.Fail, "no such file", "builder keygen", "", fault.Internal},
	}
	for _, row := range rows {
		m, c := healthyMachine(), config()
		row.change(&m, &c)
		r := doctor.Run(t.Context(), c, m)
		i := slices.IndexFunc(r.Findings, func(f doctor.Finding) bool { return f.Check == row.check && f.Level == row.level })
		if i < 0 {
			t.Errorf("%s: findings %+v; want %s of %s", row.name, r.Findings, row.level, row.check)
			continue
		}
		if f := r.Findings[i]; !strings.Contains(f.Text, row.text) || !strings.Contains(f.Next, row.next) ||
			(f.Class != "") != (f.Level == doctor.Fail) {
			t.Errorf("%s: %+v; want %q, next %q, and a class if it fails", row.name, f, row.text, row.next)
		}
		if r.Install != row.install {
			t.Errorf("%s: install %q; want %q", row.name, r.Install, row.install)
		}
		if err := r.Err(); (err != nil) != (row.level == doctor.Fail) || err != nil &&
			(fault.Of(err) != row.err || fault.Hint(err) == "") {
			t.Errorf("%s: Err() = %v (%v), hint %q; want class %v", row.name, err, fault.Of(err), fault.Hint(err), row.err)
		}
		for _, f := range r.Findings {
			if f.Next == "" && (f.Level == doctor.Warn || f.Level == doctor.Fail) {
				t.Errorf("%s: no next step for %+v", row.name, f)
			}
		}
	}
}

// TestNothingOutside checks that doctor tries only the mirrors, destinations and keys that its Config names. This
// Config names none.
func TestNothingOutside(t *testing.T) {
	t.Parallel()
	m := healthyMachine()
	m.Mirror = func(context.Context, string) error { return errors.New("was tried") }
	m.Destination, m.Key = m.Mirror, m.Mirror
	if err := doctor.Run(t.Context(), doctor.Config{Need: 1}, m).Err(); err != nil {
		t.Error(err)
	}
}

// TestBareMachine runs doctor's checks in a sandbox that has hardly any file except this test program.
func TestBareMachine(t *testing.T) {
	t.Parallel()
	installed.Program(t, "bwrap")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"--unshare-all", "--die-with-parent", "--tmpfs", "/", "--ro-bind", self, "/doctor.test",
		"--proc", "/proc", "--dir", "/tmp", "--dir", "/usr/bin", "--ro-bind", "/usr/bin/sed", "/usr/bin/sed"}
	libraries, err := vm.GlibcFiles(self) // a program with the race detector needs these; otherwise the list is empty
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range libraries {
		args = append(args, "--ro-bind", l.Path, l.Name)
	}
	cmd := exec.CommandContext(t.Context(), "bwrap",
		append(args, "--clearenv", "--setenv", envBare, "1", "--setenv", "PATH", "/usr/bin", "/doctor.test")...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in an empty root: %v\n%s", err, out)
	}
	r := &doctor.Report{}
	if err := json.Unmarshal(out, r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := "apt-get install bc bubblewrap coreutils dash findutils grep libelf1 make mawk qemu-system-arm " +
		"qemu-system-x86 util-linux"
	if diff := cmp.Diff(want, r.Install); diff != "" {
		t.Errorf("install (-want +got):\n%s", diff)
	}
	got := map[string]doctor.Level{}
	for _, f := range r.Findings {
		got[f.Check] = f.Level
	}
	for check, level := range map[string]doctor.Level{"sandbox": doctor.Fail, "build tools": doctor.Fail,
		"cache": doctor.Fail, "qemu amd64": doctor.Warn, "guestinit": doctor.Warn, "key": doctor.Fail, "mirror": doctor.Fail,
		"limits": doctor.Warn, "destination": doctor.OK} {
		if got[check] != level {
			t.Errorf("%s is %s; want %s\n%s", check, got[check], level, out)
		}
	}
	if !fault.Is(r.Err(), fault.Usage) {
		t.Errorf("Err() = %v; want usage", r.Err())
	}
}

// TestRealPrograms checks that [doctor.Real] finds the programs and libraries that this machine has, and no others.
func TestRealPrograms(t *testing.T) {
	t.Parallel()
	m := doctor.Real(licence.Rule{}, nil)
	if !m.Program("sh") || m.Program("no-such-program") || m.Library("libno-such.so.1") || !m.Library("libc.so.6") {
		t.Error("Program and Library: want sh and libc.so.6 found, and the other names not found")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "plain"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if m.Executable(filepath.Join(dir, "plain")) == nil || m.Executable(dir) == nil || m.Executable("/bin/sh") != nil {
		t.Error("Executable: want success for /bin/sh only, not for a plain file or a folder")
	}
	if free, err := m.Cache(filepath.Join(dir, "cache")); err != nil || free <= 0 {
		t.Errorf("Cache() = %d, %v", free, err)
	}
	if _, err := m.Cache("/proc/self/cache"); err == nil {
		t.Error("a cache in /proc can be opened")
	}
}
