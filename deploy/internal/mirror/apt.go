package mirror

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// indexAge is the age at which a package index is fetched again. Debian replaces kernels every few weeks.
const indexAge = 24 * time.Hour

// pkg is one Debian package in one version.
type pkg struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// upstream returns the version without epoch and Debian revision.
func (p pkg) upstream() string {
	v := p.Version
	if _, after, ok := strings.Cut(v, ":"); ok {
		v = after
	}
	if i := strings.LastIndexByte(v, '-'); i >= 0 {
		v = v[:i]
	}
	return v
}

// apt queries and downloads packages with the machine's apt program. It has its own sources, lists and caches, so the
// machine's settings do not change.
type apt struct {
	dir      string // for sources, lists, cache and packages
	conf     string
	progress func(string)
	// fresh is true if this run has fetched the index.
	fresh bool
	// fetched is when the index was fetched.
	fetched time.Time
}

// openApt prepares apt's own folders under dir, for the machine's Debian release or the next one. It fetches the
// package index if the index is missing or old, if the sources have changed, or if refresh is true.
func openApt(ctx context.Context, dir string, p platform, next, refresh bool, say func(string)) (*apt, error) {
	a := &apt{dir: dir, conf: filepath.Join(dir, "apt.conf"), progress: say}
	for _, sub := range []string{"lists/partial", "cache/archives/partial", "packages", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, err
		}
	}
	codename, err := osReleaseField("/etc/os-release", "VERSION_CODENAME")
	if err != nil {
		return nil, err
	}
	sources, err := DeriveSources(os.DirFS("/etc/apt"), codename)
	if err != nil {
		return nil, err
	}
	if next {
		sources, codename = nextSources(sources, codename), nextCodename
	}
	sources = addDebSrc(sources, codename)
	sourcesFile := filepath.Join(dir, "prebake.sources")
	before, _ := os.ReadFile(sourcesFile)
	if err := os.WriteFile(sourcesFile, sources, 0o644); err != nil {
		return nil, err
	}
	me, err := user.Current()
	if err != nil {
		return nil, fmt.Errorf("find the name of this user: %w", err)
	}
	conf := fmt.Sprintf(`Dir::Etc::SourceList %q;
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists %q;
Dir::State::extended_states %q;
Dir::Cache %q;
APT::Sandbox::User %q;
APT::Update::Post-Invoke {};
APT::Update::Post-Invoke-Success {};
Acquire::Languages "none";
Acquire::Retries "3";
`, sourcesFile, filepath.Join(dir, "lists"), filepath.Join(dir, "state/extended"), filepath.Join(dir, "cache"), me.Username) + p.aptConf()
	if err := os.WriteFile(a.conf, []byte(conf), 0o644); err != nil {
		return nil, err
	}
	stamp := filepath.Join(dir, "updated")
	info, err := os.Stat(stamp)
	have := err == nil
	if have {
		a.fetched = info.ModTime()
	}
	if have && !refresh && bytes.Equal(before, sources) && time.Since(info.ModTime()) < indexAge {
		return a, nil
	}
	if err := os.RemoveAll(filepath.Join(dir, answersDir)); err != nil {
		return nil, err
	}
	say("fetching the package index of Debian's " + codename + " for " + string(p.arch) + " (contrib and non-free too)")
	if _, err := a.run(ctx, "", "apt-get", "update", "-qq", "--error-on=any"); err != nil {
		if have && ctx.Err() == nil {
			say("package index not refreshed, using the index of an earlier run: " + firstLine(err))
			return a, nil
		}
		return nil, fault.Wrap(fault.Transient, err, "check the machine's network and apt sources, then run again")
	}
	a.fresh = true
	if err := os.WriteFile(stamp, nil, 0o644); err != nil {
		return nil, err
	}
	if info, err = os.Stat(stamp); err != nil {
		return nil, err
	}
	a.fetched = info.ModTime()
	return a, nil
}

// answersDir is the folder, below apt's own folder, in which ask caches the output of apt's programs.
const answersDir = "answers"

// ask runs a program of apt that reads only the package index, and caches its output until the index is fetched again.
// Without the cache, each call takes half a second.
func (a *apt) ask(ctx context.Context, name string, args ...string) ([]byte, error) {
	sum := sha256.Sum256([]byte(strings.Join(append([]string{name}, args...), "\x00")))
	file := filepath.Join(a.dir, answersDir, hex.EncodeToString(sum[:16]))
	if info, err := os.Stat(file); err == nil && !info.ModTime().Before(a.fetched) {
		return os.ReadFile(file)
	}
	out, err := a.run(ctx, "", name, args...)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	return out, putFile(file, string(out))
}

func (a *apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.conf, "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return output(cmd)
}

// output runs cmd and returns its stdout. The error contains the end of stderr.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, commandError(cmd, err, stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func commandError(cmd *exec.Cmd, err error, stderr []byte) error {
	text := strings.TrimSpace(string(stderr[max(0, len(stderr)-2000):]))
	if text == "" {
		return fmt.Errorf("run %s: %w", filepath.Base(cmd.Path), err)
	}
	return fmt.Errorf("run %s: %w: %s", filepath.Base(cmd.Path), err, text)
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// packageNames returns the packages whose names begin with prefix.
func (a *apt) packageNames(ctx context.Context, prefix string) ([]string, error) {
	out, err := a.ask(ctx, "apt-cache", "pkgnames", prefix)
	if err != nil {
		return nil, err
	}
	names := strings.Fields(string(out))
	slices.Sort(names)
	return names, nil
}

// versions returns the versions of each package in the index, newest first.
func (a *apt) versions(ctx context.Context, names ...string) (map[string][]string, error) {
	out, err := a.ask(ctx, "apt-cache", append([]string{"madison"}, names...)...)
	if err != nil {
		return nil, err
	}
	return parseMadison(out), nil
}

// parseMadison reads the output of apt-cache madison: lines of the form "name | version | where", with the newest
// version first. It skips source packages.
func parseMadison(out []byte) map[string][]string {
	all := map[string][]string{}
	scan := bufio.NewScanner(bytes.NewReader(out))
	for scan.Scan() {
		fields := strings.Split(scan.Text(), "|")
		if len(fields) < 3 || !strings.HasSuffix(strings.TrimSpace(fields[2]), "Packages") {
			continue
		}
		name, version := strings.TrimSpace(fields[0]), strings.TrimSpace(fields[1])
		if name != "" && version != "" && !slices.Contains(all[name], version) {
			all[name] = append(all[name], version)
		}
	}
	return all
}

// file returns the downloaded file of a package. apt writes the colon of an epoch as %3a.
func (a *apt) file(p pkg) (string, bool) {
	escaped := strings.ReplaceAll(p.Version, ":", "%3a")
	base, own, foreign := strings.Cut(p.Name, ":")
	if !foreign {
		own = "amd64"
	}
	for _, arch := range []string{own, "all"} {
		name := filepath.Join(a.dir, "packages", base+"_"+escaped+"_"+arch+".deb")
		if info, err := os.Stat(name); err == nil && info.Size() > 0 {
			return name, true
		}
	}
	return "", false
}

// mustFile returns the file of a downloaded package. It returns an error if the file is missing, for example because
// somebody removed it after the download.
func (a *apt) mustFile(p pkg) (string, error) {
	file, ok := a.file(p)
	if !ok {
		return "", fault.New(fault.InputMissing, fmt.Sprintf("open package %s: the file is not in %s", p.Name, a.dir),
			"run the command again, which downloads the package again")
	}
	return file, nil
}

// errDownload means that the archive did not serve a package, perhaps because the index is out of date.
var errDownload = errors.New("download packages")

// batch is the number of packages in one download. If a run is killed, the next run repeats only the last batch.
const batch = 8

// download downloads all missing packages. apt checks each file against the signed index. Only a complete file gets its
// final name.
func (a *apt) download(ctx context.Context, pkgs []pkg) error {
	var missing []string
	for _, p := range pkgs {
		if _, ok := a.file(p); !ok && !slices.Contains(missing, p.Name+"="+p.Version) {
			missing = append(missing, p.Name+"="+p.Version)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	a.progress(fmt.Sprintf("downloading %d Debian packages", len(missing)))
	for names := range slices.Chunk(missing, batch) {
		if err := a.downloadBatch(ctx, names); err != nil {
			return err
		}
	}
	for _, p := range pkgs {
		if _, ok := a.file(p); !ok {
			return fault.New(fault.InputMissing,
				fmt.Sprintf("download package %s %s: apt wrote no file with this name and version", p.Name, p.Version),
				"fetch the current package index: run again with --refresh")
		}
	}
	return nil
}

func (a *apt) downloadBatch(ctx context.Context, names []string) (err error) {
	tmp, err := os.MkdirTemp(a.dir, "download-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if _, err = a.run(ctx, tmp, "apt-get", append([]string{"download", "-qq"}, names...)...); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fault.Wrap(fault.Transient, fmt.Errorf("%w: %w", errDownload, err),
			"fetch the current package index: run again with --refresh")
	}
	files, err := os.ReadDir(tmp)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := os.Rename(filepath.Join(tmp, f.Name()), filepath.Join(a.dir, "packages", f.Name())); err != nil {
			return err
		}
	}
	return nil
}

// osReleaseField returns one field of an os-release file.
func osReleaseField(file, key string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the Debian release of this machine: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			return strings.Trim(v, `"'`), nil
		}
	}
	return "", fault.New(fault.Unsupported,
		fmt.Sprintf("read the Debian release of this machine: %s has no %s", file, key),
		"run on Debian 12, with the os-release of its package base-files")
}
