package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/queue"
	"github.com/prebake/prebake/pkg/target"
)

// locked is a buffer that a running server and a test can use at the same time.
type locked struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// start runs `server serve`, and returns the server's URL and its output. The function stop ends the server and returns
// its exit status.
func start(t *testing.T, dir string, more ...string) (url string, stop func() int, log *locked) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	log = &locked{}
	done := make(chan int, 1)
	args := append([]string{"server", "serve", "--listen", "127.0.0.1:0", "--data", dir, "--grace", "1s"}, more...)
	go func() { done <- cli.Run(ctx, program(), args, log, log) }()
	stop = sync.OnceValue(func() int { cancel(); return <-done })
	t.Cleanup(func() { stop() })
	deadline, end := context.WithTimeout(t.Context(), time.Minute)
	defer end()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if raw, err := os.ReadFile(filepath.Join(dir, "address")); err == nil {
			return strings.TrimSpace(string(raw)), stop, log
		}
		select {
		case code := <-done:
			t.Fatalf("server ended with %d:\n%s", code, log)
		case <-deadline.Done():
			t.Fatalf("no address after a minute:\n%s", log)
		case <-tick.C:
		}
	}
}

// run runs one command and returns its exit status and output.
func run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Run(t.Context(), program(), append([]string{"server"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

// TestOperator uses the commands of the server as an operator does, and restarts the server in between.
func TestOperator(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	url, stop, log := start(t, dir)
	token := filepath.Join(dir, "token")
	secret, err := os.ReadFile(token)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(token); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("token file has mode %v, %v; want 0600", info.Mode(), err)
	}
	digest := "sha256:" + strings.Repeat("c", 64)

	steps := []struct {
		name string
		args []string
		code int
		out  string // a part of stdout
		err  string // a part of stderr
	}{
		{"nothing known", []string{"kernels"}, 0, "no kernel is known yet", ""},
		{"request", []string{"request", "--token-file", token, "--build-id", "17800.0.47", "--driver", "535.261.03",
			"--flavour", "open"}, 0, "state      queued", ""},
		{"request again", []string{"request", "--token-file", token, "--build-id", "17800.0.47", "--driver", "535.261.03",
			"--flavour", "open"}, 0, "build      1", ""},
		{"builds", []string{"builds"}, 0, "17800.0.47/lakitu  535.261.03-open", ""},
		{"builds as JSON", []string{"builds", "--output", "json", "--state", "queued"}, 0, `"buildId": "17800.0.47"`, ""},
		{"resolve", []string{"resolve", "--build-id", "17800.0.47", "--driver", "535.261.03"}, fault.Pending.ExitCode(),
			"start a builder: builder work", "is queued"},
		{"coverage", []string{"coverage"}, 0, "no wish list wants a cell", ""},
		{"warnings", []string{"warnings"}, 0, "no early warning", ""},
		{"quarantine", []string{"quarantine"}, 0, "nothing is in quarantine", ""},
		{"lift of nothing", []string{"lift", "--token-file", token, digest}, fault.NotFound.ExitCode(), "",
			"is not in the catalogue"},
		{"no token", []string{"request", "--build-id", "17800.0.47", "--driver", "535.261.03"}, fault.Unauthorized.ExitCode(),
			"", "this call needs a token"},
		{"bad wish", []string{"resolve", "--build-id", "17800.0.47", "--driver", "new"}, 2, "", "hint:"},
		{"no such build", []string{"build", "99"}, fault.NotFound.ExitCode(), "", "the list of builds"},
		{"no log yet", []string{"build", "1", "--log"}, fault.NotFound.ExitCode(), "", "no log yet"},
		{"stray argument", []string{"kernels", "x"}, 2, "", "takes no argument"},
		{"bad number", []string{"build", "x"}, 2, "", "needs the number of one build"},
		{"unknown command", []string{"frobnicate"}, 2, "", "no command"},
		{"server away", []string{"drivers", "--server", "http://127.0.0.1:1"}, fault.Transient.ExitCode(), "",
			"check that the server runs"},
	}
	for _, s := range steps {
		args := s.args
		if s.name != "server away" && s.name != "unknown command" {
			args = append([]string{s.args[0], "--server", url}, s.args[1:]...)
		}
		code, out, errs := run(t, args...)
		if code != s.code || !strings.Contains(out, s.out) || !strings.Contains(errs, s.err) {
			t.Errorf("%s: %v = %d\n%s%s\nwant %d with %q and %q", s.name, s.args, code, out, errs, s.code, s.out, s.err)
		}
		for line := range strings.Lines(out) {
			if len([]rune(strings.TrimRight(line, "\n"))) > columns && !strings.Contains(strings.Join(args, " "), "json") {
				t.Errorf("%s: a line of %d letters: %s", s.name, len(line), line)
			}
		}
	}

	// A second server on the same data folder must refuse to start.
	if code, _, errs := run(t, "serve", "--listen", "127.0.0.1:0", "--data", dir); code != fault.Busy.ExitCode() ||
		!strings.Contains(errs, "another server") {
		t.Errorf("second server = %d %s; want busy", code, errs)
	}

	if code := stop(); code != 0 {
		t.Errorf("stop = %d; want 0\n%s", code, log)
	}
	if strings.Contains(log.String(), strings.TrimSpace(string(secret))) {
		t.Error("the log has the token in it")
	}
	if _, err := os.Stat(filepath.Join(dir, "address")); !os.IsNotExist(err) {
		t.Errorf("the address file is still there: %v", err)
	}

	// While the server is stopped, a builder takes a job from the queue's database.
	work(t, dir, func(job api.BuildJob) {
		if job.Build != 1 || job.BuildID != "17800.0.47" || job.Driver != "535.261.03" || job.Flavour != "open" {
			t.Errorf("the queue has %+v; want build 1", job)
		}
	})

	url, _, _ = start(t, dir)
	c := api.NewClient(url, strings.TrimSpace(string(secret)), nil)
	kernel := target.Kernel{BuildID: "17800.0.47", Board: "lakitu", Release: "6.1.0-47-cloud-amd64", Arch: target.AMD64}
	published := api.BuildUpdate{State: api.Published, Digest: digest, Kernel: &kernel,
		Fingerprint: target.Fingerprint("sha256:" + strings.Repeat("a", 64))}
	if _, err := c.UpdateBuild(t.Context(), 1, published); !fault.Is(err, fault.Mismatch) {
		t.Errorf("UpdateBuild(published, a digest that the registry lacks) = %v; want mismatch", err)
	}
	digest = push(t, url, string(secret), "first")
	published.Digest = digest
	// The restarted server may already have marked the build as failed. It must accept the report nevertheless.
	if _, err := c.UpdateBuild(t.Context(), 1, published); err != nil {
		t.Fatal(err)
	}
	other := push(t, url, string(secret), "second")
	if _, err := c.AddArtifact(t.Context(), api.NewArtifact{Digest: other, Fingerprint: published.Fingerprint,
		Driver: target.Driver{Version: "535.309.01", Flavour: target.Open}, Kernels: []target.Kernel{kernel}}); err != nil {
		t.Fatal(err)
	}
	none := fault.NoArtifact.ExitCode()
	for _, s := range []struct {
		args, want string
		code       int
	}{
		{"resolve --build-id 17800.0.47 --driver 535.261.03", "digest     " + digest, 0},
		{"artifacts", digest, 0}, {"kernels", "6.1.0-47-cloud-amd64", 0},
		{"yank --token-file " + token + " --reason panics " + digest, "yanked panics", 0},
		{"resolve --build-id 17800.0.47 --driver 535.261.03 --flavour open", "reason     panics", none},
		{"yank --token-file " + token + " --reason panics --replacement " + other + " " + digest, "instead    " + other, 0},
		{"resolve --build-id 17800.0.47 --driver 535.261.03 --flavour open", "instead    " + other, none},
		{"unyank --token-file " + token + " " + digest, "published", 0},
	} {
		fields := strings.Fields(s.args)
		code, out, errs := run(t, append([]string{fields[0], "--server", url}, fields[1:]...)...)
		if code != s.code || !strings.Contains(out, s.want) {
			t.Errorf("%s = %d\n%s%s\nwant %d and %q", s.args, code, out, errs, s.code, s.want)
		}
	}
	// The server must not offer an artifact that was deleted from its registry.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, url+"/v2/prebake/driver/manifests/"+digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("x", strings.TrimSpace(string(secret)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := resp.Body.Close(); err != nil || resp.StatusCode != http.StatusAccepted {
		t.Fatalf("DELETE = %s, %v", resp.Status, err)
	}
	r, err := c.Resolve(t.Context(),
		api.Question{BuildID: "17800.0.47", Board: "lakitu", Driver: "535.261.03", Flavour: "open"})
	if err != nil || r.State == api.Published {
		t.Errorf("Resolve() after the manifest was deleted = %s, %v", r.State, err)
	}
}

// push pushes a random image to the server's registry, as any OCI client does, and returns its digest.
func push(t *testing.T, url, secret, tag string) (digest string) {
	t.Helper()
	ref, err := name.ParseReference(strings.TrimPrefix(url, "http://")+"/prebake/driver:"+tag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	err = remote.Write(ref, img, remote.WithContext(t.Context()),
		remote.WithAuth(&authn.Basic{Username: "x", Password: strings.TrimSpace(secret)}))
	if err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// work takes one job from the queue of a stopped server, and passes the job to see.
func work(t *testing.T, dir string, see func(api.BuildJob)) {
	t.Helper()
	q, err := queue.Open(t.Context(), "sqlite://"+filepath.Join(dir, "queue.db"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := q.Work(ctx, "test", 1, func(_ context.Context, job api.BuildJob, _ int) error {
		see(job)
		cancel()
		return nil
	}); err != nil {
		t.Error(err)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

// TestWait checks the exit status of a command with --wait: it must be that of the build's error class.
func TestWait(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	url, _, _ := start(t, dir, "--token", "0123456789abcdef")
	c := api.NewClient(url, "0123456789abcdef", nil)
	args := []string{"request", "--server", url, "--token", "0123456789abcdef", "--build-id", "17800.0.47", "--driver",
		"535.1", "--flavour", "open"}
	if code, _, errs := run(t, args...); code != 0 {
		t.Fatal(errs)
	}
	if _, err := c.UpdateBuild(t.Context(), 1, api.BuildUpdate{State: api.Building}); err != nil {
		t.Fatal(err)
	}
	type result struct {
		code int
		errs string
	}
	done := make(chan result, 1)
	go func() {
		var out, errs bytes.Buffer
		code := cli.Run(t.Context(), program(), append([]string{"server"}, append(args, "--wait")...), &out, &errs)
		done <- result{code, errs.String()}
	}()
	if _, err := c.UpdateBuild(t.Context(), 1,
		api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "nv-pci.c:1: error", Hint: "newer"}); err != nil {
		t.Fatal(err)
	}
	// This loop also ends build 2, if the command requested it only after build 1 had failed.
	for {
		all, err := c.Builds(t.Context(), api.Queued)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range all {
			if _, err := c.UpdateBuild(t.Context(), b.ID,
				api.BuildUpdate{State: api.Failed, Class: "api-break", Error: "nv-pci.c:1: error", Hint: "newer"}); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case r := <-done:
			if r.code != fault.APIBreak.ExitCode() || !strings.Contains(r.errs, "nv-pci.c:1") ||
				!strings.Contains(r.errs, "newer") {
				t.Errorf("--wait = %d %s; want %d with the compiler's line", r.code, r.errs, fault.APIBreak.ExitCode())
			}
			return
		default:
		}
	}
}

// TestWaitedClass checks the kind of the error for a build that ended without an artifact, also if this program does
// not know the build's error class.
func TestWaitedClass(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		build api.Build
		want  fault.Kind
	}{
		{api.Build{State: api.Cancelled}, fault.Cancelled},
		{api.Build{State: api.Failed, Class: "web-page", Error: "odd page"}, fault.WebPage},
		{api.Build{State: api.Failed, Class: "new-trouble", Error: "odd page"}, fault.Internal},
	} {
		err := errUnlessPublished(true, row.build)
		if !fault.Is(err, row.want) {
			t.Errorf("errUnlessPublished(%q) = %v of kind %v; want %v", row.build.Class, err, fault.Of(err), row.want)
		}
		if row.want == fault.Internal && !strings.Contains(err.Error(), "new-trouble: odd page") {
			t.Errorf("errUnlessPublished(%q) = %v; want the class in the text", row.build.Class, err)
		}
	}
}

// TestOneServerOnOneFile checks that a second server with a data folder of its own does not start with an SQLite file
// of a running server, by whatever path. A server must start when the first one has ended, also after the data was
// moved.
func TestOneServerOnOneFile(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	first, moved := filepath.Join(top, "first"), filepath.Join(top, "moved")
	_, stop, _ := start(t, first)
	if err := errors.Join(os.Symlink(first, filepath.Join(top, "folder")),
		os.Symlink(filepath.Join(first, "catalogue.db"), filepath.Join(top, "file.db"))); err != nil {
		t.Fatal(err)
	}
	refuses := func(flag, file string) {
		t.Helper()
		file = filepath.Join(top, file)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // a server that starts must end
		defer cancel()
		var out bytes.Buffer
		code := cli.Run(ctx, program(), []string{"server", "serve", "--listen", "127.0.0.1:0", "--data",
			filepath.Join(top, "second"), "--" + flag, "sqlite://" + file}, &out, &out)
		if code != fault.Busy.ExitCode() || !strings.Contains(out.String(), flag+" "+file+" is in use by another") ||
			!strings.Contains(out.String(), "hint:") {
			t.Fatalf("a second server with --%s %s = %d\n%s\nwant busy, and the file", flag, file, code, &out)
		}
	}
	for _, row := range []struct{ flag, file string }{
		{"database", "first/catalogue.db"}, {"database", "folder/catalogue.db"}, {"database", "file.db"},
		{"queue", "first/queue.db"}, {"queue", "folder/queue.db"},
	} {
		refuses(row.flag, row.file)
	}
	if code := stop(); code != 0 {
		t.Errorf("stop = %d; want 0", code)
	}
	if err := os.Rename(first, moved); err != nil {
		t.Fatal(err)
	}
	start(t, moved)
	both := "sqlite://" + filepath.Join(top, "both.db")
	start(t, filepath.Join(top, "third"), "--database", both, "--queue", "sqlite://"+top+"//both.db")

	// The server makes the file to which the link leads.
	if err := errors.Join(os.Mkdir(filepath.Join(top, "real"), 0o700),
		os.Symlink("real/later.db", filepath.Join(top, "later.db"))); err != nil {
		t.Fatal(err)
	}
	start(t, filepath.Join(top, "fourth"), "--database", "sqlite://"+filepath.Join(top, "later.db"))
	refuses("database", "later.db")
	refuses("database", "real/later.db")
}

func TestServeRefuses(t *testing.T) {
	t.Parallel()
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, []byte("x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--database", "mysql://x"}, {"--queue", "x"}, {"--token", "short"}, {"--token-file", short},
		{"--token-file", "/does/not/exist"}, {"--log-level", "loud"}, {"--public-repository", ""},
	} {
		all := append([]string{"serve", "--listen", "127.0.0.1:0", "--data", t.TempDir()}, args...)
		if code, _, errs := run(t, all...); code != 2 || !strings.Contains(errs, "hint:") {
			t.Errorf("serve %v = %d %s; want 2 with a hint", args, code, errs)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	code, out, _ := run(t, "version", "--output", "json")
	var v map[string]string
	if err := json.Unmarshal([]byte(out), &v); code != 0 || err != nil || v["version"] == "" {
		t.Errorf("version = %d %s, %v", code, out, err)
	}
}

// TestHelp checks that the help fits a terminal, and that each flag is under a heading.
func TestHelp(t *testing.T) {
	t.Parallel()
	if err := cli.CheckHelp(program); err != nil {
		t.Error(err)
	}
}
