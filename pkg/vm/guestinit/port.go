package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// port sends bytes to the host.
type port interface {
	io.Writer
	// drain waits until all bytes are sent.
	drain() error
}

// openPort opens the serial port with this device file. Without a kernel driver, it drives the hardware itself
// ([uart]).
func openPort(path string) (port, error) {
	t, err := openTTY(path)
	if err == nil {
		return t, nil
	}
	u, bare := openUART("/sys/bus/pci/devices")
	if bare != nil {
		return nil, fmt.Errorf("%w; drive the port without a kernel driver: %w", err, bare)
	}
	return u, nil
}

// tty is a serial port with a kernel driver.
type tty struct{ *os.File }

// openTTY opens a serial port in raw mode, without changes by the line discipline. The device file may exist without a
// port; reading its settings then fails.
func openTTY(path string) (tty, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return tty{}, fmt.Errorf("open %s: %w", path, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		_ = unix.Close(fd)
		return tty{}, fmt.Errorf("open %s: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		_ = unix.Close(fd)
		return tty{}, fmt.Errorf("set up %s: %w", path, err)
	}
	return tty{os.NewFile(uintptr(fd), path)}, nil
}

func (t tty) drain() error { return unix.IoctlSetInt(int(t.Fd()), unix.TCSBRK, 1) }
