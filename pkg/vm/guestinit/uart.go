package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Registers of qemu's pci-serial, which is a 16550A behind an I/O port BAR (docs/specs/pci-serial.rst of qemu).
// guestinit drives this device itself, because COS's kernels for Arm lack CONFIG_SERIAL_8250_PCI.
const (
	uartVendor, uartDevice = "0x1b36", "0x0002"

	uartData   = 0 // write: the byte to send
	uartFIFO   = 2 // write: FIFO control
	uartStatus = 5 // read: line status

	uartFIFOOn  = 0x01 // also empties the FIFO if it was off
	uartMayFill = 0x20 // the FIFO takes uartDepth bytes
	uartIdle    = 0x40 // the FIFO is empty and the last bit was sent
	uartDepth   = 16
)

// uartTimeout is how long the host may leave bytes unread. The host reads from a pipe, so it needs far less time.
const uartTimeout = time.Minute

// registers gives access to the registers of a device, one byte at each offset.
type registers interface {
	io.ReaderAt
	io.WriterAt
}

// uart is a serial port without a kernel driver. guestinit writes each byte into the port's register.
type uart struct{ r registers }

// openUART finds the port among the PCI devices in a folder of sysfs, and opens the file of its I/O port BAR. Each
// access to a byte of that file is an access to the I/O port (Documentation/PCI/sysfs-pci.rst of the kernel).
func openUART(devices string) (uart, error) {
	dir, err := findUART(devices)
	if err != nil {
		return uart{}, err
	}
	if err := os.WriteFile(filepath.Join(dir, "enable"), []byte("1"), 0); err != nil {
		return uart{}, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "resource0"), os.O_RDWR, 0)
	if err != nil {
		return uart{}, err
	}
	u, err := newUART(f)
	if err != nil {
		return uart{}, errors.Join(fmt.Errorf("set up %s: %w", f.Name(), err), f.Close())
	}
	return u, nil
}

func findUART(devices string) (string, error) {
	vendors, err := filepath.Glob(filepath.Join(devices, "*", "vendor"))
	if err != nil {
		return "", err
	}
	for _, vendor := range vendors {
		dir := filepath.Dir(vendor)
		if fileContains(vendor, uartVendor) && fileContains(filepath.Join(dir, "device"), uartDevice) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find serial port: none of %d PCI devices is %s:%s", len(vendors), uartVendor, uartDevice)
}

func fileContains(file, word string) bool {
	text, err := os.ReadFile(file)
	return err == nil && strings.TrimSpace(string(text)) == word
}

func newUART(r registers) (uart, error) {
	u := uart{r}
	status, err := u.status()
	if err != nil {
		return u, err
	}
	if status == 0xff {
		return u, errors.New("the serial port does not answer at its I/O ports")
	}
	return u, u.put(uartFIFO, uartFIFOOn)
}

func (u uart) Write(p []byte) (int, error) {
	for n, b := range p {
		if n%uartDepth == 0 {
			if err := u.await(uartMayFill); err != nil {
				return n, err
			}
		}
		if err := u.put(uartData, b); err != nil {
			return n, err
		}
	}
	return len(p), nil
}

func (u uart) drain() error { return u.await(uartIdle) }

// await waits until one of the status bits is set, for at most uartTimeout.
func (u uart) await(bits byte) error {
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		status, err := u.status()
		if err != nil || status&bits != 0 {
			return err
		}
		if time.Since(start) > uartTimeout {
			return fmt.Errorf("write serial port: the port is not ready after %[2]v; its line status is %#[1]x", status,
				uartTimeout)
		}
	}
}

func (u uart) status() (byte, error) {
	var b [1]byte
	_, err := u.r.ReadAt(b[:], uartStatus)
	return b[0], err
}

func (u uart) put(offset int64, b byte) error {
	_, err := u.r.WriteAt([]byte{b}, offset)
	return err
}
