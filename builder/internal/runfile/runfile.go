// Package runfile reads NVIDIA's driver archives (makeself runfiles) without running them. It finds the compressed tar
// after the shell script, and reads the .manifest inside, which describes each file.
//
// The package never executes anything. It does not unpack the tar; package archive does.
package runfile

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"

	"github.com/prebake/prebake/pkg/archive"
	"github.com/prebake/prebake/pkg/fault"
)

// Limits of the script: lines and bytes. NVIDIA's script has about 1,100 lines and 40 KB, the original makeself's 700
// lines.
const (
	maxLines  = 20_000
	maxScript = 4 << 20
)

var skipPattern = regexp.MustCompile(`^skip=(["']?)([0-9]{1,6})["']?\s*$`)

// Header says where the payload of a runfile begins and how it is compressed.
type Header struct {
	// Skip is the number in the script's skip= line.
	Skip int
	// Offset is the position of the payload's first byte.
	Offset int64
	// Format is the compression of the payload.
	Format archive.Format
}

// Payload reads the script of a runfile and returns a reader for the compressed tar after it. If no compressed tar
// follows the script, the error is [fault.Unverified].
//
// In NVIDIA's files, the number in skip= is the line at which the payload begins. In files of the original makeself it
// is the last line of the script. Payload looks at both positions.
func Payload(r io.Reader) (io.Reader, Header, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	var h Header
	line := 0
	next := func() ([]byte, error) {
		if line >= maxLines {
			return nil, damaged("the script is longer than %d lines", maxLines)
		}
		text, err := readLine(br, maxScript-h.Offset)
		h.Offset += int64(len(text))
		line++
		return text, err
	}
	for h.Skip == 0 || line < h.Skip-1 {
		text, err := next()
		if err != nil {
			return nil, h, err
		}
		if line == 1 && !bytes.HasPrefix(text, []byte("#!")) {
			return nil, h, damaged("the file does not start with a script")
		}
		m := skipPattern.FindSubmatch(bytes.TrimRight(text, "\r\n"))
		if m == nil || h.Skip != 0 {
			continue
		}
		if h.Skip, err = strconv.Atoi(string(m[2])); err != nil || h.Skip < line {
			return nil, h, damaged("skip=%s on line %d names a line before that line", m[2], line)
		}
	}
	for range 2 {
		if h.Format = peekFormat(br); h.Format != "" {
			return br, h, nil
		}
		if line >= h.Skip {
			break
		}
		if _, err := next(); err != nil {
			return nil, h, err
		}
	}
	return nil, h, damaged("no compressed tar begins at or after line %d, the number in skip=", h.Skip)
}

func peekFormat(br *bufio.Reader) archive.Format {
	head, _ := br.Peek(512) // if the payload is shorter, Peek returns an error and the bytes that exist
	return archive.Detect(head)
}

// readLine reads one line of at most limit bytes, with its line end.
func readLine(br *bufio.Reader, limit int64) ([]byte, error) {
	var whole []byte
	for {
		part, err := br.ReadSlice('\n')
		if int64(len(whole)+len(part)) > limit {
			return nil, damaged("the script is longer than %d bytes", maxScript)
		}
		whole = append(whole, part...)
		switch {
		case err == nil:
			return whole, nil
		case errors.Is(err, io.EOF):
			return nil, damaged("the file ends inside its script")
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("read runfile: %w", err)
		}
	}
}

func damaged(format string, args ...any) error {
	return fault.New(fault.Unverified, "read runfile: "+fmt.Sprintf(format, args...),
		"check that the object is NVIDIA's .run file, whole and unchanged")
}
