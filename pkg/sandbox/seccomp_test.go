package sandbox_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/pkg/sandbox"
	"github.com/prebake/prebake/pkg/testkit/program"
)

// inFilter is an environment variable. If it is set, this program tries system calls and runs no tests.
const inFilter = "PREBAKE_TEST_SECCOMP"

// tryCalls prints the result of each system call: the name of the error, or nothing after the call's name if the kernel
// allows the call.
func tryCalls() {
	call := func(name string, number uintptr, args ...uintptr) {
		var a [6]uintptr
		copy(a[:], args)
		_, _, errno := unix.Syscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
		fmt.Printf("%s %s\n", name, unix.ErrnoName(errno))
	}
	call("getpid", unix.SYS_GETPID)
	call("bpf", unix.SYS_BPF, 0, 0, 0)
	call("keyctl", unix.SYS_KEYCTL, 0, 0, 0)
	call("io_uring_setup", unix.SYS_IO_URING_SETUP, 1, 0)
	call("perf_event_open", unix.SYS_PERF_EVENT_OPEN)
	call("ptrace", unix.SYS_PTRACE, unix.PTRACE_TRACEME)
	call("userfaultfd", unix.SYS_USERFAULTFD)
	call("unshare", unix.SYS_UNSHARE, 0)
	call("mount", unix.SYS_MOUNT)
	call("open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT)
	call("newest", 2000)
	call("clone user", unix.SYS_CLONE, unix.CLONE_NEWUSER|unix.CLONE_THREAD) // EINVAL without the filter
	call("socketpair 1", unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM, 0, uintptr(unsafe.Pointer(new([2]int32))))
	call("socketpair 40", unix.SYS_SOCKETPAIR, unix.AF_VSOCK, unix.SOCK_DGRAM, 0, 0)
	for _, family := range []int{unix.AF_UNIX, unix.AF_INET, unix.AF_VSOCK, unix.AF_ALG, unix.AF_PACKET} {
		call(fmt.Sprintf("socket %d", family), unix.SYS_SOCKET, uintptr(family), unix.SOCK_DGRAM, 0)
	}
}

func TestFilter(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Without a sandbox, most of these calls have other results. So it is the filter that refuses them, and not this
	// machine's kernel.
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = []string{inFilter + "=1"}
	bare, err := cmd.Output()
	if err != nil || !strings.Contains(string(bare), "unshare \n") ||
		!strings.Contains(string(bare), "clone user EINVAL\n") {
		t.Fatalf("without a sandbox: %v\n%s", err, bare)
	}
	dir := t.TempDir()
	text, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	program.Write(t, filepath.Join(dir, "self"), text)
	got, err := shell(t, inFilter+"=1 /prebake/self", sandbox.Bind{Host: dir, Inside: "/prebake"})
	if err != nil {
		t.Fatalf("%v\n%s", err, got)
	}
	want := `getpid 
bpf ENOSYS
keyctl ENOSYS
io_uring_setup ENOSYS
perf_event_open ENOSYS
ptrace ENOSYS
userfaultfd ENOSYS
unshare ENOSYS
mount ENOSYS
open_by_handle_at ENOSYS
newest ENOSYS
clone user EPERM
socketpair 1 
socketpair 40 EAFNOSUPPORT
socket 1 
socket 2 
socket 40 EAFNOSUPPORT
socket 38 EAFNOSUPPORT
socket 17 EAFNOSUPPORT`
	if got != want {
		t.Errorf("in the sandbox:\n%s\nwant\n%s\nwithout a sandbox:\n%s", got, want, bare)
	}
}

// TestOtherABI checks that the filter refuses system calls by the 32-bit ABI of x86.
func TestOtherABI(t *testing.T) {
	t.Parallel()
	if runtime.GOARCH != "amd64" {
		t.Skip("int $0x80 is of x86 only")
	}
	dir := t.TempDir()
	program.Write(t, filepath.Join(dir, "old"), oldCall())
	bare := exec.CommandContext(t.Context(), filepath.Join(dir, "old")).Run()
	if got, err := shell(t, "/prebake/old; echo $?", sandbox.Bind{Host: dir, Inside: "/prebake"}); err != nil ||
		got != "38" {
		t.Errorf("int $0x80 for getpid ended with %s, %v (without a sandbox: %v); want 38, ENOSYS", got, err, bare)
	}
	var exit *exec.ExitError
	if errors.As(bare, &exit) && exit.ExitCode() == 38 {
		t.Logf("this machine's kernel has no 32-bit calls itself")
	}
}

// oldCall returns a 64-bit program that calls getpid with int $0x80, the 32-bit ABI. Its exit status is the number of
// the error, or 0. The file's header follows elf(5), and the machine code follows Intel's manual.
func oldCall() []byte {
	const base = 0x400000
	code := []byte{
		0xb8, 20, 0, 0, 0, // mov $20, %eax (getpid of 32-bit x86)
		0xcd, 0x80, // int $0x80
		0x31, 0xff, // xor %edi, %edi
		0x85, 0xc0, // test %eax, %eax
		0x79, 0x04, // jns +4
		0xf7, 0xd8, // neg %eax
		0x89, 0xc7, // mov %eax, %edi
		0xb8, 60, 0, 0, 0, // mov $60, %eax (exit)
		0x0f, 0x05, // syscall
	}
	type header struct {
		Ident                                   [16]byte
		Type, Machine                           uint16
		Version                                 uint32
		Entry, Phoff, Shoff                     uint64
		Flags                                   uint32
		Ehsize, Phentsize, Phnum                uint16
		Shentsize, Shnum, Shstrndx              uint16
		PType, PFlags                           uint32
		Off, Vaddr, Paddr, Filesz, Memsz, Align uint64
	}
	h := header{Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: 2, Machine: 62, Version: 1, Phoff: 64, Ehsize: 64,
		Phentsize: 56, Phnum: 1,
		PType: 1, PFlags: 5, Vaddr: base, Paddr: base, Align: 0x1000}
	size := uint64(binary.Size(h))
	h.Entry, h.Filesz, h.Memsz = base+size, size+uint64(len(code)), size+uint64(len(code))
	text, err := binary.Append(nil, binary.LittleEndian, h)
	if err != nil {
		panic(err) // cannot fail: the types have fixed sizes
	}
	return append(text, code...)
}
