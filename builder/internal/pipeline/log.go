package pipeline

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/cas"
)

// logCopy keeps what a build says, so that it can be published with what was
// built.
type logCopy struct {
	file    *os.File
	cleanup func() error
}

func newLogCopy(cache *cas.Cache) (*logCopy, error) {
	dir, cleanup, err := cache.TempDir("log-")
	if err != nil {
		return nil, err
	}
	file, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, errors.Join(err, cleanup())
	}
	return &logCopy{file, cleanup}, nil
}

// Write never fails: a build is worth more than its log. What could not be
// kept is missing in the published log.
func (c *logCopy) Write(p []byte) (int, error) {
	_, _ = c.file.Write(p)
	return len(p), nil
}

// packed returns all that was said so far.
func (c *logCopy) packed() (log struct {
	bytes  []byte
	digest string
}, err error) {
	if _, err := c.file.Seek(0, io.SeekStart); err != nil {
		return log, err
	}
	log.bytes, log.digest, err = publish.PackLog(c.file)
	return log, err
}

func (c *logCopy) close() error { return errors.Join(c.file.Close(), c.cleanup()) }
