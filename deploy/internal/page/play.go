package page

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// Command is a command that a page tells a reader to type, with the output that the page shows.
type Command struct {
	// Text is a script for bash, of one or more lines.
	Text string
	// Want are the lines of output below the command, including stderr. In a line, "…" stands for any text. A line that is
	// only "…" stands for any number of lines. nil means any output.
	Want []string
	// Line is the number of the command's first line on the page; the first line is 1.
	Line int
}

// Commands returns the commands of a shell block. In the language console, a command begins with "$ ", and its output
// follows. A block of any other language is one command.
func (b Block) Commands() []Command {
	if b.Language != "console" {
		return []Command{{Text: b.Text, Line: b.Line}}
	}
	var all []Command
	continued := false
	for i, line := range strings.Split(strings.TrimSuffix(b.Text, "\n"), "\n") {
		text, begins := strings.CutPrefix(line, "$ ")
		switch last := len(all) - 1; {
		case begins && !continued:
			all = append(all, Command{Text: text, Line: b.Line + i})
		case continued:
			all[last].Text += "\n" + line
		case last >= 0:
			all[last].Want = append(all[last].Want, line)
		}
		continued = len(all) > 0 && all[len(all)-1].Want == nil && strings.HasSuffix(line, `\`)
	}
	return all
}

// Script returns the commands of all blocks that a test runs, in their order on the page.
func (p *Page) Script() []Command {
	var all []Command
	for _, b := range p.Blocks {
		if b.Run {
			all = append(all, b.Commands()...)
		}
	}
	return all
}

// Play runs the commands in one bash, in the folder dir, and compares their output with the page. It stops at the first
// command that fails or whose output differs; the error has the command's line on the page. At the end, it kills
// background jobs.
func Play(ctx context.Context, dir string, env []string, commands []Command) error {
	var script strings.Builder
	script.WriteString("exec 2>&1\n")
	for i, c := range commands {
		fmt.Fprintf(&script, "%s\nstatus=$?; printf '\\n%s%d %%d\\n' $status; [ $status = 0 ] || exit 1\n", c.Text, mark, i)
	}
	log := filepath.Join(dir, "output")
	// The output goes to a file, because a pipe would stay open as long as a background job runs.
	out, err := os.Create(log)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "bash", "-c", script.String())
	cmd.Dir, cmd.Env, cmd.Stdout = dir, env, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	run := cmd.Run()
	if cmd.Process != nil {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			run = errors.Join(run, err)
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	text, err := os.ReadFile(log)
	if err != nil {
		return err
	}
	var exit *exec.ExitError
	if run != nil && !errors.As(run, &exit) {
		return run
	}
	return judge(commands, string(text))
}

// mark is the beginning of the line that Play prints after each command's output.
const mark = "\x01command "

func judge(commands []Command, output string) error {
	for i, c := range commands {
		got, rest, ok := strings.Cut(output, "\n"+mark+strconv.Itoa(i)+" ")
		if !ok {
			return fmt.Errorf("line %d: the command\n%s\ndid not end; it printed:\n%s", c.Line, c.Text, output)
		}
		var status string
		status, output, _ = strings.Cut(rest, "\n")
		if status != "0" {
			return fmt.Errorf("line %d: the command\n%s\nended with exit status %s, and printed:\n%s", c.Line, c.Text, status,
				got)
		}
		if c.Want != nil && !isMatch(c.Want, got) {
			return fmt.Errorf("line %d: the command\n%s\nprinted:\n%s\nwant:\n%s", c.Line, c.Text, got, strings.Join(c.Want,
				"\n"))
		}
	}
	return nil
}

// isMatch reports whether the output of a command is what the page shows.
func isMatch(want []string, got string) bool {
	var b strings.Builder
	b.WriteString("^")
	for _, line := range want {
		if line == "…" {
			b.WriteString(`(?:.*\n)*`)
			continue
		}
		for i, part := range strings.Split(strings.TrimRight(line, " "), "…") {
			if i > 0 {
				b.WriteString(".*")
			}
			b.WriteString(regexp.QuoteMeta(part))
		}
		b.WriteString(` *\n`)
	}
	b.WriteString("$")
	return regexp.MustCompile(b.String()).MatchString(strings.Trim(got, "\n") + "\n")
}
