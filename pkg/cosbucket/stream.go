package cosbucket

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// progress is the number of bytes after which the retries of a download are counted from 0 again.
const progress = 1 << 20

// stream is a download. If the connection breaks, stream continues at the same offset, on the same mirror or on another
// one that has the same bytes. At the end, it compares the sums of the bytes with those that the bucket reported.
type stream struct {
	ctx    context.Context //nolint:containedctx // a Reader has no other way to be cancelled; it is for one download
	bucket *Bucket
	name   string
	from   backend
	body   io.ReadCloser
	attrs  Attrs
	check  check
	offset int64
	broke  int64 // offset of the last break
	tries  int   // retries on this mirror since the last progress
	moves  int   // changes of the mirror since the last progress
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.body.Read(p)
	s.offset += int64(n)
	s.check.write(p[:n])
	switch {
	case err == nil:
		return n, nil
	// All bytes have arrived, so an error of the connection does not matter.
	case s.offset == s.attrs.Size, errors.Is(err, io.EOF) && s.attrs.Size < 0:
		if err := s.check.judge(s.offset); err != nil {
			return n, err
		}
		return n, io.EOF
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	case s.ctx.Err() != nil:
		return n, s.ctx.Err()
	case errors.As(err, new(*fs.PathError)):
		return n, err // a retry does not help against an error of the disk
	}
	if s.attrs.Size >= 0 && s.offset > s.attrs.Size {
		return n, s.check.judge(s.offset)
	}
	return n, s.resume(err)
}

// resume opens the rest of the object after the connection broke.
func (s *stream) resume(cause error) error {
	if s.offset-s.broke >= progress {
		s.tries, s.moves = 0, 0
	}
	s.broke = s.offset
	broken := fault.Wrap(fault.Transient, fmt.Errorf("download %s: the connection broke after %d bytes: %w", s.name,
		s.offset, cause),
		"try again; check the network on the way to the bucket")
	if s.attrs.pin == "" {
		return s.otherMirror(broken)
	}
	for s.tries < retryMax {
		if err := pause(s.ctx, s.bucket.wait<<s.tries); err != nil {
			return err
		}
		s.tries++
		body, _, err := s.from.open(s.ctx, s.name, s.offset, s.attrs.pin)
		if err == nil {
			_ = s.body.Close() // broken, so its error does not matter
			s.body = body
			return nil
		}
		if s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		broken = fault.Join(broken, err)
		if !fault.Is(err, fault.Transient) {
			break
		}
	}
	return s.otherMirror(broken)
}

// otherMirror continues the download on another mirror, if that mirror reports the same sums for the object.
func (s *stream) otherMirror(broken error) error {
	for i, m := range s.bucket.mirrors {
		if m == s.from {
			// Ask the next mirror first from now on, even for this object.
			s.bucket.prefer(i + 1)
			continue
		}
		if !s.check.strong() || s.moves == len(s.bucket.mirrors)-1 {
			continue
		}
		body, attrs, err := m.open(s.ctx, s.name, s.offset, "")
		if err != nil {
			if s.ctx.Err() != nil {
				return s.ctx.Err()
			}
			broken = fault.Join(broken, err)
			continue
		}
		if same, decided := s.attrs.same(attrs); !same {
			_ = body.Close() // not used
			if decided {
				return fault.New(fault.Checksum, fmt.Sprintf("%s and %s have different bytes", s.attrs.URL, m.url(s.name)),
					"use only mirrors of one bucket; if these are mirrors of one bucket, replace the damaged one of the two objects")
			}
			continue
		}
		_ = s.body.Close() // broken, so its error does not matter
		s.body, s.from, s.tries = body, m, 0
		s.moves++
		s.attrs.pin = attrs.pin
		s.bucket.prefer(i)
		return nil
	}
	return broken
}

func (s *stream) Close() error { return s.body.Close() }

// same reports whether two objects have the same bytes. The second result is false if the buckets report too little to
// decide that.
func (a Attrs) same(b Attrs) (same, decided bool) {
	decided = a.MD5 != "" && b.MD5 != "" || a.CRC32C != "" && b.CRC32C != "" && a.Size >= 0 && b.Size >= 0
	differ := func(x, y string) bool { return x != "" && y != "" && x != y }
	if differ(a.MD5, b.MD5) || differ(a.CRC32C, b.CRC32C) || a.Size >= 0 && b.Size >= 0 && a.Size != b.Size {
		return false, true
	}
	return decided, decided
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// check compares an object with the attributes that the bucket reported.
type check struct {
	attrs  Attrs
	md5    hash.Hash   // nil if the bucket reported no md5
	crc32c hash.Hash32 // nil if the bucket reported no crc32c
}

func newCheck(a Attrs) check {
	c := check{attrs: a}
	if a.MD5 != "" {
		c.md5 = md5.New()
	}
	if a.CRC32C != "" {
		c.crc32c = crc32.New(crc32.MakeTable(crc32.Castagnoli))
	}
	return c
}

// strong reports whether the bucket reported a checksum. A checksum detects that a resumed download continued with
// other bytes.
func (c check) strong() bool { return c.md5 != nil || c.crc32c != nil }

func (c check) write(p []byte) {
	if c.md5 != nil {
		c.md5.Write(p)
	}
	if c.crc32c != nil {
		c.crc32c.Write(p)
	}
}

func (c check) judge(size int64) error {
	bad := func(what, want, got string) error {
		return fault.New(fault.Checksum, fmt.Sprintf("download %s: the content has %s %s; the bucket says %s", c.attrs.URL,
			what, got,
			want),
			"try again; if it happens again, put the object into the bucket again, or use another mirror")
	}
	if c.attrs.Size >= 0 && size != c.attrs.Size {
		return bad("size", fmt.Sprint(c.attrs.Size), fmt.Sprint(size))
	}
	if c.md5 != nil {
		if got := hex.EncodeToString(c.md5.Sum(nil)); got != c.attrs.MD5 {
			return bad("md5", c.attrs.MD5, got)
		}
	}
	if c.crc32c != nil {
		if got := hex.EncodeToString(c.crc32c.Sum(nil)); got != c.attrs.CRC32C {
			return bad("crc32c", c.attrs.CRC32C, got)
		}
	}
	return nil
}
