package main

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// certificate is what the server shows in TLS. It is read again when its file
// changed, so that who renews it, such as cert-manager, need not restart anything.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex
	looked  time.Time
	changed time.Time
	loaded  *tls.Certificate
}

// reloadInterval is the least the time between two checks of the file.
const reloadInterval = time.Second

// openCertificate reads a pair of files in PEM.
func openCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.read(); err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("read certificate: %w", err),
			"give --tls-cert and --tls-key files in PEM that belong together",
		)
	}
	return c, nil
}

func (c *certificate) read() error {
	info, err := os.Stat(c.certFile)
	if err != nil {
		return err
	}
	if c.loaded != nil && info.ModTime().Equal(c.changed) {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return err
	}
	c.loaded, c.changed = &pair, info.ModTime()
	return nil
}

// get is for crypto/tls. A pair that cannot be read, such as one of which only half
// is written yet, leaves the one before in use.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.looked) >= reloadInterval {
		c.looked = now
		before := c.changed
		if err := c.read(); err != nil {
			c.log.Warn("certificate not read again", "file", c.certFile, "err", err)
		} else if !before.Equal(c.changed) {
			c.log.Info("certificate read again", "file", c.certFile)
		}
	}
	return c.loaded, nil
}
