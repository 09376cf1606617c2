package publish

import (
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	ocidigest "github.com/opencontainers/go-digest"

	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
)

// Limits of a build log in bytes. The middle of a longer log is dropped: a reader needs the beginning (inputs and
// flags) and the end (the error) most. A build with its tests writes about 1 MB.
const (
	maxLogHead = 4 << 20
	maxLogTail = 12 << 20
)

// PackLog compresses a build log for [Artifact.Log], and drops the middle of a long log. It also returns the log's
// digest in the registry, for the provenance.
func PackLog(log io.Reader) (packed []byte, digest string, err error) {
	text, err := readEnds(log, maxLogHead, maxLogTail)
	if err == nil {
		packed, err = compress(text)
	}
	// If a compressed log is still above the limit of an attachment, drop more of its middle.
	for most := maxLogTail; err == nil && len(packed) > registry.MaxAttachment; {
		most /= 2
		if text, err = readEnds(bytes.NewReader(text), most/4, most); err == nil {
			packed, err = compress(text)
		}
	}
	if err != nil {
		return nil, "", fmt.Errorf("pack the build log: %w", err)
	}
	return packed, ocidigest.FromBytes(packed).String(), nil
}

// UnpackLog returns the text of an attached build log.
func UnpackLog(packed []byte) ([]byte, error) {
	text, err := func() ([]byte, error) {
		d, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderMaxMemory(64<<20), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		const most = maxLogHead + maxLogTail + 1<<10
		text, err := io.ReadAll(io.LimitReader(d, most+1))
		if err == nil && len(text) > most {
			err = fmt.Errorf("the log has more than %d bytes", most)
		}
		return text, err
	}()
	if err != nil {
		return nil, fault.Wrap(fault.Unverified, fmt.Errorf("unpack the build log: %w", err), "")
	}
	return text, nil
}

func compress(text []byte) ([]byte, error) {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer e.Close()
	return e.EncodeAll(text, nil), nil
}

// readEnds returns the first head bytes and the last tail bytes of r, in bounded memory.
func readEnds(r io.Reader, head, tail int) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, int64(head)))
	if err != nil || len(text) < head {
		return text, err
	}
	var end []byte
	left := 0
	chunk := make([]byte, 64<<10)
	for {
		n, err := r.Read(chunk)
		end = append(end, chunk[:n]...)
		if len(end) > 2*tail { // this copies each byte once on average
			left += len(end) - tail
			end = append(end[:0], end[len(end)-tail:]...)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	if len(end) > tail {
		left += len(end) - tail
		end = end[len(end)-tail:]
	}
	if left > 0 {
		text = fmt.Appendf(text, "\n[... %d bytes are left out here ...]\n", left)
	}
	return append(text, end...), nil
}
