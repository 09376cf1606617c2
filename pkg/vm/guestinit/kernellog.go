package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// maxKernelLog is the approximate maximum size in bytes of the text that read returns, well below wire.MaxLine.
const maxKernelLog = 1 << 20

// kernelLog reads /dev/kmsg. Each read returns one record (Documentation/ABI/testing/dev-kmsg in the kernel's source).
type kernelLog struct {
	mu sync.Mutex
	fd int
}

func openKernelLog(path string) (*kernelLog, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open kernel log: %w", err)
	}
	return &kernelLog{fd: fd}, nil
}

// read returns the records since the last call, one per line.
func (k *kernelLog) read() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var text strings.Builder
	record := make([]byte, 16<<10)
	for text.Len() < maxKernelLog {
		n, err := unix.Read(k.fd, record)
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR) {
			continue // records were overwritten, or a signal came; the next read continues
		}
		if err != nil || n <= 0 {
			break // EAGAIN: no more records
		}
		if line, ok := formatRecord(string(record[:n])); ok {
			text.WriteString(line)
			text.WriteByte('\n')
		}
	}
	return text.String()
}

// formatRecord turns a record such as "6,339,5140900,-;text" into a line as dmesg prints it, without continuation
// lines.
func formatRecord(record string) (string, bool) {
	head, body, ok := strings.Cut(record, ";")
	if !ok {
		return "", false
	}
	fields := strings.Split(head, ",")
	if len(fields) < 3 {
		return "", false
	}
	us, err := strconv.ParseUint(fields[2], 10, 64)
	if err != nil {
		return "", false
	}
	text, _, _ := strings.Cut(body, "\n") // the lines after it are a device's dictionary
	return fmt.Sprintf("[%5d.%06d] %s", us/1e6, us%1e6, unescape(text)), true
}

// unescape decodes \xHH, which the kernel writes for each unprintable byte. Control characters become spaces.
func unescape(text string) string {
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+3 < len(text) && text[i+1] == 'x' {
			if b, err := strconv.ParseUint(text[i+2:i+4], 16, 8); err == nil {
				out.WriteByte(printable(byte(b)))
				i += 3
				continue
			}
		}
		out.WriteByte(printable(text[i]))
	}
	return strings.TrimSpace(out.String())
}

func printable(b byte) byte {
	if b < ' ' {
		return ' '
	}
	return b
}
