package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fakeUART is a serial port of the type 16550A, with the registers that guestinit uses. As in a real one, bytes that
// are written to a full FIFO are lost.
type fakeUART struct {
	fifo  []byte
	on    bool
	sent  bytes.Buffer
	slow  int   // number of reads of the status register until the FIFO is sent; -1 means never
	asked int   // number of reads since the FIFO was sent
	lost  int   // number of lost bytes
	err   error // returned by each access
	off   bool  // the I/O ports do not respond
}

func (f *fakeUART) ReadAt(p []byte, off int64) (int, error) {
	if len(p) != 1 || off != 5 {
		return 0, errors.New("a read that the kernel or the device would not take")
	}
	if f.off {
		p[0] = 0xff
		return 1, f.err
	}
	if f.asked++; f.slow >= 0 && f.asked > f.slow {
		f.sent.Write(f.fifo)
		f.fifo, f.asked = nil, 0
	}
	if p[0] = 0; len(f.fifo) == 0 {
		p[0] = 0x60
	}
	return 1, f.err
}

func (f *fakeUART) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case len(p) != 1:
		return 0, errors.New("a write that the device would not take")
	case f.err != nil:
		return 0, f.err
	case off == 2:
		f.on = p[0] == 1
	case off == 0 && (len(f.fifo) == 0 || f.on && len(f.fifo) < 16):
		f.fifo = append(f.fifo, p[0])
	default:
		f.lost++
	}
	return 1, nil
}

func TestUART(t *testing.T) {
	t.Parallel()
	for _, slow := range []int{0, 1, 7} {
		synctest.Test(t, func(t *testing.T) {
			f := &fakeUART{slow: slow}
			u, err := newUART(f)
			if err != nil {
				t.Fatal(err)
			}
			var want []byte
			for _, size := range []int{0, 1, 15, 16, 17, 1000} {
				line := append(bytes.Repeat([]byte{'x'}, size), '\n')
				want = append(want, line...)
				if n, err := u.Write(line); n != len(line) || err != nil {
					t.Fatalf("Write(%d bytes) = %d, %v", len(line), n, err)
				}
			}
			if err := u.drain(); err != nil {
				t.Error(err)
			}
			if got := f.sent.Bytes(); f.lost > 0 || !bytes.Equal(got, want) {
				t.Errorf("the host got %d bytes, %d were lost; want all %d as they were", len(got), f.lost, len(want))
			}
		})
	}
}

func TestUARTGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		u, err := newUART(&fakeUART{slow: -1})
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if n, err := u.Write(make([]byte, 20)); n != 16 || err == nil {
			t.Errorf("Write(20 bytes) to a host that reads nothing = %d, %v; want 16 and an error", n, err)
		}
		if took := time.Since(start); took < uartTimeout || took > 2*uartTimeout {
			t.Errorf("it waited %v; want %v", took, uartTimeout)
		}
	})
	if _, err := newUART(&fakeUART{off: true}); err == nil {
		t.Error("newUART() where nothing answers = nil; want an error")
	}
	broken := errors.New("broken")
	u := uart{&fakeUART{err: broken}}
	if n, err := u.Write([]byte("x")); n != 0 || !errors.Is(err, broken) {
		t.Errorf("Write() = %d, %v; want the file's error", n, err)
	}
	if _, err := newUART(&fakeUART{err: broken}); !errors.Is(err, broken) {
		t.Errorf("newUART() = %v; want the file's error", err)
	}
}

func TestOpenUART(t *testing.T) {
	t.Parallel()
	devices := t.TempDir()
	add := func(address, vendor, device string) string {
		dir := filepath.Join(devices, address)
		files := map[string]string{"vendor": vendor + "\n", "device": device + "\n", "enable": "0\n",
			"resource0": "\x00\x00\x00\x00\x00\x60\x00\x00"}
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	add("0000:00:00.0", "0x1b36", "0x0008")
	add("0000:00:01.0", "0x1af4", "0x0002")
	if _, err := openUART(devices); err == nil || !strings.Contains(err.Error(), "none of 2 PCI devices") {
		t.Errorf("openUART() = %v; want the devices counted", err)
	}
	dir := add("0000:00:02.0", "0x1b36", "0x0002")
	u, err := openUART(devices)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := u.Write([]byte("ab")); n != 2 || err != nil {
		t.Errorf("Write() = %d, %v", n, err)
	}
	enabled, err := os.ReadFile(filepath.Join(dir, "enable"))
	if err != nil || strings.TrimSpace(string(enabled)) != "1" {
		t.Errorf("enable = %q, %v; want 1", enabled, err)
	}
	const want = "b\x00\x01\x00\x00\x60\x00\x00" // the last byte in the data register, and then the FIFO control register
	if got, err := os.ReadFile(filepath.Join(dir, "resource0")); err != nil || string(got) != want {
		t.Errorf("registers = %q, %v; want %q", got, err, want)
	}
}
