package sandbox

import "golang.org/x/sys/unix"

const (
	auditArch = unix.AUDIT_ARCH_AARCH64
	lastCall  = unix.SYS_FUTEX_REQUEUE // 456, Linux 6.7
)

var archRefusedCalls = []uint32{unix.SYS_NFSSERVCTL, unix.SYS_LOOKUP_DCOOKIE}
