// Command bench measures the server with the catalogue of a large farm: 5,000 kernels, 60,000 cells, a year of builds.
// It fills a database, runs the server, calls it from the same machine and prints a table.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

type settings struct {
	server, database                string
	kernels, drivers, builds, queue int
	rate                            int
	storm                           int
	length, stormLength             time.Duration
	only                            *regexp.Regexp // names of the loads to measure; nil means all
	fillOnly                        bool
}

func main() {
	var s settings
	flag.StringVar(&s.server, "server", "bin/server", "program to measure")
	flag.StringVar(
		&s.database,
		"database",
		"",
		"postgres://… or sqlite://… to fill (it must be empty); empty is SQLite in a temporary folder",
	)
	flag.IntVar(&s.kernels, "kernels", 5000, "COS builds")
	flag.IntVar(&s.drivers, "drivers", 6, "driver versions; each has two flavours")
	flag.IntVar(&s.builds, "builds", 100_000, "finished builds in the database; most of their cells are published")
	flag.IntVar(&s.queue, "queue", 2000, "builds that wait for a builder")
	flag.IntVar(&s.rate, "rate", 3000, "requests per second")
	flag.IntVar(&s.storm, "storm", 15_000, "nodes that boot at the same time in the boot storm")
	flag.DurationVar(&s.length, "length", 15*time.Second, "duration of each measurement")
	flag.DurationVar(&s.stormLength, "storm-length", time.Minute, "time within which all nodes of the boot storm boot")
	flag.Func("only", "measure only the loads whose name matches this `pattern`", func(text string) (err error) {
		s.only, err = regexp.Compile(text)
		return err
	})
	flag.BoolVar(&s.fillOnly, "fill-only", false, "only fill the database, and measure nothing")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, s, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "prebake-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	url, name := s.database, "PostgreSQL"
	if url == "" {
		url = "sqlite://" + filepath.Join(dir, "catalogue.db")
	}
	if strings.HasPrefix(url, "sqlite:") {
		name = "SQLite"
	}
	begin := time.Now()
	world, err := fill(ctx, url, s)
	if err != nil {
		return fmt.Errorf("fill database: %w", err)
	}
	fmt.Fprintf(out, "%s: %d kernels, %d cells, %d builds of which %d wait; filled in %v\n", name, s.kernels,
		s.kernels*s.drivers*2, s.builds, s.queue, time.Since(begin).Round(time.Second))
	if s.fillOnly {
		return nil
	}
	p, err := start(ctx, s.server, dir, url)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	rows, err := measure(ctx, p, world, s)
	if err != nil {
		return err
	}
	peak, err := p.peak()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tCALLS\tERRORS\tP50\tP99\tMAX\tP50 / HEALTHZ\tSERVER\tLOAD\tLARGEST")
	floor := rows[0].percentile(50)
	for _, r := range rows {
		fmt.Fprintf(
			w,
			"%s\t%d\t%d\t%s\t%s\t%s\t%.1f\t%s\t%s\t%s\n",
			r.name,
			len(r.took),
			r.failed,
			short(r.percentile(50)),
			short(r.percentile(99)),
			short(r.percentile(100)),
			float64(r.percentile(50))/float64(max(floor, 1)),
			cores(r.server),
			cores(r.load),
			size(r.largest),
		)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	troubles.Range(func(text, at any) bool {
		fmt.Fprintf(out, "error: %v, such as for %v\n", text, at)
		return true
	})
	fmt.Fprintln(out, "SERVER and LOAD: cores that the server and this program kept busy meanwhile")
	fmt.Fprintln(out, "LARGEST: the largest answer as it came over the connection, compressed where that pays")
	_, err = fmt.Fprintf(out, "server's memory at its peak: %d MiB\n", peak>>20)
	return err
}

func short(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }

func size(n int64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f kB", float64(n)/1000)
}

func cores(used float64) string {
	if used < 0 {
		return ""
	}
	return fmt.Sprintf("%.2f", used)
}

// process is a running server.
type process struct {
	cmd *exec.Cmd
	url string
}

func start(ctx context.Context, program, dir, database string) (*process, error) {
	data := filepath.Join(dir, "data")
	// There is no limit for each address, because all calls come from one address.
	cmd := exec.CommandContext(ctx, program, "serve", "--data", data, "--listen", "127.0.0.1:0", "--database", database,
		"--queue", "sqlite://"+filepath.Join(dir, "queue.db"), "--client-rate", "0")
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for range 600 {
		raw, err := os.ReadFile(filepath.Join(data, "address"))
		if err == nil {
			return &process{cmd, strings.TrimSpace(string(raw))}, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, errors.Join(errors.New("the server did not start within 30 s"), cmd.Process.Kill(), cmd.Wait())
}

func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return p.cmd.Wait()
}

// usage is the processor time of the server and of this program until the time at. ok is false if the kernel does not
// report it.
type usage struct {
	at           time.Time
	server, load time.Duration
	ok           bool
}

// cpu reads the processor times. The server's are fields 14 and 15 of /proc/PID/stat, in hundredths of a second
// (proc(5)).
func (p *process) cpu() usage {
	u := usage{at: time.Now()}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return u
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // the text after the program's name starts with field 3
	fields := strings.Fields(rest)
	var self syscall.Rusage
	if len(fields) < 13 || syscall.Getrusage(syscall.RUSAGE_SELF, &self) != nil {
		return u
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	system, serr := strconv.ParseInt(fields[12], 10, 64)
	u.server = time.Duration(user+system) * 10 * time.Millisecond
	u.load = time.Duration(self.Utime.Nano() + self.Stime.Nano())
	u.ok = err == nil && serr == nil
	return u
}

// peak returns the greatest memory use of the process so far, in bytes (proc(5), VmHWM).
func (p *process) peak() (int64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("read peak memory: the process status has no VmHWM")
}
