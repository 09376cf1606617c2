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

// certificate is the server's TLS certificate. A changed file is read again, so a renewal needs no restart.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex
	looked  time.Time
	changed time.Time
	loaded  *tls.Certificate
}

// reloadInterval is the minimum pause between two checks for a changed file.
const reloadInterval = time.Second

// openCertificate reads the certificate and its key from PEM files.
func openCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.read(); err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("read the server's TLS certificate: %w", err),
			"give --tls-cert a certificate in PEM, and --tls-key the private key of that certificate in PEM",
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

// get returns the certificate for a new connection; crypto/tls calls it. If certificate and key cannot be read as a
// pair, the former pair stays in use.
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
