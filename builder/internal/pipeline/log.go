package pipeline

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/prebake/prebake/builder/internal/publish"
	"github.com/prebake/prebake/pkg/cas"
)

// logCopy keeps a copy of a build's log, to be published with the artifact.
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

// Write never returns an error, because a fault of the log must not fail the build. The published log then lacks some
// text.
func (c *logCopy) Write(p []byte) (int, error) {
	_, _ = c.file.Write(p)
	return len(p), nil
}

// pack compresses the text that was logged so far. digest is the digest that the compressed log has in a registry.
func (c *logCopy) pack() (log struct {
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
