package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// answerWithin bounds one call.
const answerWithin = 30 * time.Second

// connection is one connection that is kept, for one caller at a time. The load
// runs on the server's own cores, so a question costs it as little as it can: no
// goroutine, and no request that is built anew.
type connection struct {
	host string // with its port
	net  net.Conn
	read *bufio.Reader
	ask  []byte
	used time.Time
	// largest is the size of the largest answer so far, in bytes as they came.
	largest int64
}

// get asks for a path and reads the answer to its end. A connection that failed is
// opened anew by the next call.
func (c *connection) get(path string) error {
	now := time.Now()
	if c.net != nil && now.Sub(c.used) > time.Minute { // the server may close it any moment
		c.close()
	}
	if c.net == nil {
		var err error
		if c.net, err = net.DialTimeout("tcp", c.host, answerWithin); err != nil {
			return err
		}
		if c.read == nil {
			c.read = bufio.NewReader(nil)
		}
		c.read.Reset(c.net)
	}
	c.used = now
	if err := c.exchange(path, now); err != nil {
		c.close()
		return err
	}
	return nil
}

func (c *connection) exchange(path string, now time.Time) error {
	if err := c.net.SetDeadline(now.Add(answerWithin)); err != nil {
		return err
	}
	c.ask = append(c.ask[:0], "GET "...)
	c.ask = append(c.ask, path...)
	c.ask = append(c.ask, " HTTP/1.1\r\nHost: "...)
	c.ask = append(c.ask, c.host...)
	c.ask = append(c.ask, "\r\nUser-Agent: prebake-bench\r\nAccept-Encoding: gzip\r\n\r\n"...)
	if _, err := c.net.Write(c.ask); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.read, nil)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, resp.Body)
	c.largest = max(c.largest, n)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// close ends the connection, if there is one; nothing was promised about it.
func (c *connection) close() {
	if c.net != nil {
		_ = c.net.Close()
		c.net = nil
	}
}
