package agent_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/prebake/prebake/fetcher/internal/sample"
	"github.com/prebake/prebake/pkg/modinfo"
)

// kernel stands in for the system calls that load and unload modules. It records the calls, and updates the fake /proc
// and /sys.
type kernel struct {
	root string
	// refuse has the errno of a refused load, by the module's name and version.
	refuse map[string]syscall.Errno
	// die names a module and version whose load kills the program. open names a module and version that another program
	// opens as soon as it is loaded.
	die, open string
	// says has the line that the kernel logs at the load of a module, by the module's name and version.
	says map[string]string
	// ids means that /sys has the build ids of the loaded modules.
	ids bool

	mu    sync.Mutex
	calls []string
	log   []string
}

func (k *kernel) InitModule(image []byte, params string) error {
	m, err := modinfo.Read(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		return syscall.ENOEXEC
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = append(k.calls, strings.TrimSpace("load "+m.Name+" "+m.Version+" "+params))
	if k.die == m.Name+" "+m.Version {
		panic("killed")
	}
	if errno, ok := k.refuse[m.Name+" "+m.Version]; ok {
		k.log = append(k.log, "<4>[    9.000001] NVRM: "+m.Name+" says "+errno.Error())
		return errno
	}
	if line := k.says[m.Name+" "+m.Version]; line != "" {
		k.log = append(k.log, line)
	}
	if m.Name == "nvidia" {
		k.must(os.MkdirAll(filepath.Join(k.root, "proc/driver/nvidia"), 0o755))
		k.must(os.WriteFile(filepath.Join(k.root, "proc/driver/nvidia/version"),
			[]byte("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "+m.Version+"  Release Build  (builder@host)\n"),
			0o644))
	}
	k.must(os.MkdirAll(filepath.Join(k.root, "sys/module", m.Name), 0o755))
	k.must(os.WriteFile(filepath.Join(k.root, "sys/module", m.Name, "version"), []byte(m.Version+"\n"), 0o644))
	if k.ids {
		notes := filepath.Join(k.root, "sys/module", m.Name, "notes")
		k.must(os.MkdirAll(notes, 0o755))
		k.must(os.WriteFile(filepath.Join(notes, modinfo.BuildIDNote),
			[]byte(sample.BuildNote(strings.ReplaceAll(m.Name, "_", "-")+m.Version)), 0o644))
	}
	return k.modules(func(lines []string) []string {
		refs := "0"
		if k.open == m.Name+" "+m.Version {
			refs = "1"
		}
		return append([]string{m.Name + " 4096 " + refs + " - Live 0x0000000000000000 (O)"}, lines...)
	})
}

func (k *kernel) DeleteModule(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls = append(k.calls, "unload "+name)
	k.must(os.RemoveAll(filepath.Join(k.root, "sys/module", name)))
	if name == "nvidia" {
		k.must(os.RemoveAll(filepath.Join(k.root, "proc/driver/nvidia")))
	}
	return k.modules(func(lines []string) []string {
		var rest []string
		for _, line := range lines {
			if !strings.HasPrefix(line, name+" ") {
				rest = append(rest, line)
			}
		}
		return rest
	})
}

func (k *kernel) Log() ([]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]string{"<6>[    0.000000] Linux version 6.1.77+"}, k.log...), nil
}

func (k *kernel) modules(edit func([]string) []string) error {
	path := filepath.Join(k.root, "proc/modules")
	raw, err := os.ReadFile(path)
	k.must(err)
	lines := edit(strings.Split(strings.TrimSpace(string(raw)), "\n"))
	return os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o644)
}

func (k *kernel) must(err error) {
	if err != nil {
		panic(err)
	}
}
