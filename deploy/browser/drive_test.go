package browser

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/prebake/prebake/pkg/testkit/inputs"
)

// question is one line of input for drive.mjs.
type question struct {
	// Do is page, feed, badge, status or draw.
	Do     string `json:"do"`
	URL    string `json:"url"`
	Status int    `json:"status,omitempty"`
	Sticky string `json:"sticky,omitempty"`
	// Large is true if the page's table must be long enough to scroll.
	Large bool `json:"large"`
	// File is the path of the screenshot, without its ending.
	File string `json:"file,omitempty"`
}

// answer is the result of drive.mjs for one question.
type answer struct {
	Error    string    `json:"error"`
	Findings []finding `json:"findings"`
	Title    string    `json:"title"`
	Status   int       `json:"status"`
	// Weight is the size of the page with all its resources, in bytes, uncompressed.
	Weight int `json:"weight"`
}

type finding struct {
	View, Check, Text string
}

// driver is a browser that drive.mjs controls.
type driver struct {
	in  io.Writer
	out *bufio.Reader
	// said is the program's output on stderr.
	said *bytes.Buffer
}

// startDriver starts Chromium, which runs until the test ends.
func startDriver(t *testing.T) *driver {
	t.Helper()
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("find Chromium: %v; run: make setup", err)
	}
	// Go's cache of test results does not notice the files that a node program reads.
	inputs.Files(t, "drive.mjs", "checks.mjs", "feed.mjs", "package-lock.json", "modules.sh")
	modules, err := exec.Command("./modules.sh").Output()
	if err != nil {
		t.Fatalf("install node modules: %v: %s", err, stderr(err))
	}
	d := &driver{said: &bytes.Buffer{}}
	cmd := exec.Command("node", "drive.mjs", strings.TrimSpace(string(modules)), chromium)
	cmd.Stderr = d.said
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	d.in, d.out = in, bufio.NewReaderSize(out, 1<<20)
	if err := cmd.Start(); err != nil {
		t.Fatalf("start node: %v; run: make setup", err)
	}
	t.Cleanup(func() {
		_ = in.Close() // drive.mjs and Chromium end when the input ends
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("node drive.mjs: %v: %s", err, d.said)
		}
	})
	return d
}

// ask sends one question and returns the answer.
func (d *driver) ask(t *testing.T, q question) answer {
	t.Helper()
	var a answer
	line, err := json.Marshal(q)
	if err == nil {
		_, err = d.in.Write(append(line, '\n'))
	}
	if err == nil {
		line, err = d.out.ReadBytes('\n')
	}
	if err == nil {
		err = json.Unmarshal(line, &a)
	}
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	if err != nil {
		t.Fatalf("%s %s: %v: %s", q.Do, q.URL, err, d.said)
	}
	return a
}

// stderr returns the stderr output of a command that ended with err.
func stderr(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(exit.Stderr)
	}
	return fmt.Sprint(err)
}
