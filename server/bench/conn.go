package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// answerWithin is the time limit of one call.
const answerWithin = 30 * time.Second

// connection is an open HTTP connection for one caller at a time. The callers run on the same cores as the server, so a
// call must cost little: it starts no goroutine, and reuses the buffer of its request.
type connection struct {
	host string // includes the port
	net  net.Conn
	read *bufio.Reader
	ask  []byte
	used time.Time
	// largest is the size of the largest response so far, in bytes on the wire.
	largest int64
}

// get requests a path and reads the whole response. After an error, the next call opens a new connection.
func (c *connection) get(path string) error {
	now := time.Now()
	if c.net != nil && now.Sub(c.used) > time.Minute { // the server may close an idle connection
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

// close closes the connection, if there is one. It ignores errors.
func (c *connection) close() {
	if c.net != nil {
		_ = c.net.Close()
		c.net = nil
	}
}
