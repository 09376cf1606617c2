package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// output runs a program in a folder and returns its stdout. The given variables are added to the environment.
func output(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	switch {
	case err == nil:
		return stdout.Bytes(), nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	text := stderr.Bytes()
	text = bytes.TrimSpace(text[max(0, len(text)-2000):])
	return nil, fmt.Errorf("run %s %s: %w: %s", name, strings.Join(args, " "), err, text)
}

func (c *config) git(ctx context.Context, args ...string) (string, error) {
	out, err := output(ctx, c.source, nil, "git", args...)
	return strings.TrimSpace(string(out)), err
}

// head returns the commit of the source. It refuses a source tree that differs from the commit.
func (c *config) head(ctx context.Context) (string, error) {
	// The user's own git settings may hide new files, so the command ignores the user's list of ignored files.
	changes, err := c.git(ctx, "-c", "core.excludesFile=/dev/null", "status", "--porcelain", "--untracked-files=all",
		"--ignore-submodules=none")
	if err != nil {
		return "", err
	}
	if changes != "" {
		return "", fault.New(fault.Usage, "make the release: these changes are not committed: "+changes[:min(len(changes),
			200)],
			"commit the changes, or undo them")
	}
	return c.git(ctx, "rev-parse", "HEAD")
}

// checkUnchanged returns an error if the source has changed since the release began.
func (c *config) checkUnchanged(ctx context.Context) error {
	commit, err := c.head(ctx)
	if err == nil && commit != c.commit {
		err = fault.New(fault.Usage, fmt.Sprintf("make the release: the source was at commit %s, and is at commit %s now",
			c.commit, commit),
			"make the release again, and do not change the source meanwhile")
	}
	return err
}

// trackedFiles returns the files that git tracks below a folder of the source. Their paths are relative to that folder.
func (c *config) trackedFiles(ctx context.Context, folder string) ([]string, error) {
	dir := filepath.Join(c.source, folder)
	out, err := output(ctx, dir, nil, "git", "ls-files", "-z")
	if err != nil {
		return nil, err
	}
	return strings.FieldsFunc(string(out), func(r rune) bool { return r == 0 }), nil
}

// readCommit reads the commit and its date from git, and also the version if none was given. SOURCE_DATE_EPOCH replaces
// the date.
func (c *config) readCommit(ctx context.Context) error {
	git := func(args ...string) (string, error) { return c.git(ctx, args...) }
	var err error
	if c.commit, err = c.head(ctx); err != nil {
		return err
	}
	c.check = c.checkUnchanged
	if c.version == "" {
		// Without a fixed length, git's abbreviation depends on the number of objects in the clone.
		if c.version, err = git("describe", "--tags", "--always", "--abbrev=12"); err != nil {
			return err
		}
	}
	// SOURCE_DATE_EPOCH follows https://reproducible-builds.org/specs/source-date-epoch/.
	seconds := os.Getenv("SOURCE_DATE_EPOCH")
	if seconds == "" {
		if seconds, err = git("log", "-1", "--format=%ct"); err != nil {
			return err
		}
	}
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return fault.New(fault.Usage, fmt.Sprintf("read SOURCE_DATE_EPOCH: %.40q is not a number of seconds", seconds),
			"set SOURCE_DATE_EPOCH to seconds since 1970, or unset it")
	}
	c.date = time.Unix(n, 0).UTC()
	return nil
}

// goVersion returns the Go release in go.mod, which compiles every program of a Prebake release.
func (c *config) goVersion(ctx context.Context) (string, error) {
	out, err := output(ctx, c.source, nil, "go", "list", "-m", "-f", "{{.GoVersion}}")
	return "go" + strings.TrimSpace(string(out)), err
}

// checkGo returns an error if another Go release than the one in go.mod compiled this program. The program compresses
// the images' layers with its standard library, and another Go release may give other bytes.
func (c *config) checkGo(ctx context.Context, running string) error {
	want, err := c.goVersion(ctx)
	if err == nil && running != want {
		err = fault.New(fault.Usage, fmt.Sprintf("make the release: this program was compiled with %s; go.mod wants %s",
			running, want),
			"unset GOEXPERIMENT, and run: GOTOOLCHAIN="+want+" make release")
	}
	return err
}

// triples has the GNU name of each architecture, as in the names of Debian's compilers.
var triples = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// programs are compiled for each architecture. nvmlprobe opens NVIDIA's libraries, so it uses the node's C library. The
// others are static.
var programs = []struct {
	name, pkg string
	cgo       bool
}{
	{"builder", "./builder", false},
	{"server", "./server", false},
	{"fetcher", "./fetcher", false},
	{"guestinit", "./pkg/vm/guestinit", false},
	{"nvmlprobe", "./fetcher/nvmlprobe", true},
}

// platform returns the folder of an architecture's programs. builder looks for guestinit and nvmlprobe in its own
// folder, so the programs keep their names.
func platform(arch string) string { return "linux-" + arch }

// goFlags are the flags of all compiles. The programs contain no debug information, so -dwarf=false switches it off in
// the compiler, too. With Go 1.26.8, two compiles of one package for arm64 can differ in debug information alone. The
// programs' build IDs, which depend on all that was compiled, then differ too. The Makefile has the same flags.
const goFlags = "-trimpath -tags=grpcnotrace -gcflags=all=-dwarf=false"

// buildPrograms compiles the programs into the platforms' folders below dir.
func (c *config) buildPrograms(ctx context.Context, dir string) error {
	toolchain, err := c.goVersion(ctx)
	if err != nil {
		return err
	}
	for _, arch := range c.arches {
		to := filepath.Join(dir, platform(arch))
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		for _, p := range programs {
			c.say("building %s for %s", p.name, arch)
			// These variables override everything in the user's environment that changes the compiled program.
			env := []string{
				"GOOS=linux", "GOARCH=" + arch, "GOAMD64=v1", "GOARM64=v8.0",
				"GOEXPERIMENT=", "GOFIPS140=off", "GOWORK=off",
				"GOTOOLCHAIN=" + toolchain, "GOFLAGS=" + goFlags, "CGO_ENABLED=0",
			}
			if p.cgo {
				env = append(env, "CGO_ENABLED=1", "CC="+triples[arch]+"-gcc-12",
					"CGO_CFLAGS=-O2 -g -Wno-deprecated-declarations", "CGO_CPPFLAGS=", "CGO_LDFLAGS=-O2 -g")
			}
			_, err := output(ctx, c.source, env, "go", "build", "-buildvcs=false",
				"-ldflags", "-s -w -X main.version="+c.version, "-o", filepath.Join(to, p.name), p.pkg)
			if err != nil {
				return fault.Wrap(fault.Internal, err, "if a program is missing, run: deploy/setup.sh build run arm64")
			}
			if err := os.Chmod(filepath.Join(to, p.name), 0o755); err != nil {
				return err
			}
		}
	}
	return nil
}

// releaseNotes returns the section of CHANGELOG.md for a version, or else the section of unreleased changes.
func releaseNotes(changelog []byte, version string) ([]byte, error) {
	sections := map[string]string{}
	heading := ""
	for line := range strings.Lines(string(changelog)) {
		if text, ok := strings.CutPrefix(line, "## "); ok {
			// A date may follow the version in the heading.
			heading, _, _ = strings.Cut(strings.TrimSpace(text), " ")
		} else if heading != "" {
			sections[heading] += line
		}
	}
	for _, name := range []string{version, strings.TrimPrefix(version, "v"), "Unreleased"} {
		if text := strings.TrimSpace(sections[name]); text != "" {
			return []byte("# Prebake " + version + "\n\n" + text + "\n"), nil
		}
	}
	return nil, fault.New(fault.Usage, "make the release: CHANGELOG.md has no section for "+version,
		"add a section ## "+version)
}
