package bootcfg

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/prebake/prebake/fetcher/internal/noderoot"
	"github.com/prebake/prebake/pkg/fault"
)

// Node is the boot configuration of the node on which this program runs.
type Node struct{ Root *noderoot.Root }

// Apply calls [Apply] on the node's EFI partition.
func (n Node) Apply(want Want) (entries int, err error) {
	esp, closed, err := Partition(n.Root)
	if err != nil {
		return 0, err
	}
	entries, err = Apply(esp, want)
	return entries, errors.Join(err, closed())
}

// Undo calls [Undo] on the node's EFI partition.
func (n Node) Undo() error {
	esp, closed, err := Partition(n.Root)
	if err != nil {
		return err
	}
	return errors.Join(Undo(esp), closed())
}

// rebootSignal is SIGRTMIN+5, with which systemd starts reboot.target (systemd(1), "Signals"). SIGRTMIN is 34
// (signal(7)).
const rebootSignal = syscall.Signal(34 + 5)

// Reboot asks the node's systemd for an orderly reboot.
func (Node) Reboot() error {
	name, err := os.ReadFile("/proc/1/comm")
	if err != nil || strings.TrimSpace(string(name)) != "systemd" {
		return fault.New(fault.Unusable,
			fmt.Sprintf("ask for a reboot: process 1 is %q; want systemd", strings.TrimSpace(string(name))),
			"give this container the node's processes: set hostPID: true in the pod")
	}
	if err := syscall.Kill(1, rebootSignal); err != nil {
		return fmt.Errorf("ask for a reboot: %w", err)
	}
	return nil
}
