package install_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/testkit/installed"
)

// spareVariable makes TestSpareProcess run.
const spareVariable = "PREBAKE_TEST_SPARE"

// TestSpareProcess writes a file with reserved space several times. After each write, the file must have a spare again.
// In the last writes, no new file can be made, as on a full disk.
func TestSpareProcess(t *testing.T) {
	if os.Getenv(spareVariable) == "" {
		return
	}
	s := open(t)
	const size = 4096
	for name, content := range map[string][]byte{"there.json": []byte("{}\n"), "missing.json": nil} {
		name = ".prebake/" + name
		if err := s.Reserve(name, content, size); err != nil {
			t.Fatal(err)
		}
		for i, text := range []string{"one", "two", "three"} {
			if i == 2 {
				if err := os.Mkdir(s.Path("tmp-file"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.WriteReserved(name, []byte(text), size); err != nil {
				t.Errorf("%s: WriteReserved(%s) = %v", name, text, err)
			}
			if raw, err := s.ReadFile(name); err != nil || strings.TrimRight(string(raw), " ") != text {
				t.Errorf("%s: it has %.20q, %v; want %s", name, raw, err, text)
			}
			if info, err := os.Lstat(filepath.Join(s.Dir(), name+".spare")); i < 2 && (err != nil || info.Size() != size) {
				t.Errorf("%s: its spare after %s: %v, %v; want %d bytes", name, text, info, err, size)
			}
		}
		if err := os.Remove(s.Path("tmp-file")); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSpare checks that a file with reserved space gets a new spare if the write used the former one up: because the
// file was missing, or because the file system cannot exchange two names.
func TestSpare(t *testing.T) {
	t.Parallel()
	installed.Program(t, "bwrap")
	const number, flags = 0, 16 + 4*8 // offsets in struct seccomp_data; flags is the low half of the fifth argument
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: number, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_RENAMEAT2, SkipFalse: 3},
		bpf.LoadAbsolute{Off: flags, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.RENAME_EXCHANGE, SkipFalse: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EINVAL)},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
	})
	if err != nil {
		t.Fatal(err)
	}
	var raw bytes.Buffer
	if err := binary.Write(&raw, binary.NativeEndian, filter); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "filter")
	if err := os.WriteFile(name, raw.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]string{
		"exchanges names":       `exec "$0" "$@"`,
		"cannot exchange names": `exec bwrap --dev-bind / / --die-with-parent --seccomp 3 -- "$0" "$@" 3<` + name,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), "sh", "-c", row, os.Args[0], "-test.run=^TestSpareProcess$", "-test.v")
			cmd.Env = append(os.Environ(), spareVariable+"=1")
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestSpareProcess") {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
