// Command release makes a release of Prebake in one folder: programs, container images, manifests, contents (SPDX),
// checksums and a signed provenance statement. The same commit gives the same bytes, except for the signatures. The
// command refuses uncommitted changes, and Debian packages that differ from packages.lock.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/prebake/prebake/pkg/fault"
)

// config has everything that decides what a release contains.
type config struct {
	// source is the repository's folder.
	source string
	// version is the version of the release, which the programs print. commit is the commit of the source.
	version, commit string
	// date is the commit's time, or SOURCE_DATE_EPOCH. The images' configs and the SPDX documents contain this time.
	date time.Time
	// arches are the architectures, with the names of GOARCH.
	arches []string
	// lock is the path of the file that lists the Debian packages of the builder's image (packages.lock).
	lock string
	// archives are base URLs or folders with these packages. If empty, the archives of this machine's apt are used.
	archives []string
	// cache is the folder for downloaded packages.
	cache string
	// key is the signing key: a file or a KMS URI. If empty, the release is signed with a new key, which is deleted
	// afterwards.
	key string
	// builderID is the URI that says in the provenance who made the release.
	builderID string
	// check returns an error if the source has changed. It is called before signing; if nil, nothing is checked.
	check func(context.Context) error
	// say prints progress for a person.
	say func(format string, args ...any)
}

func main() {
	c := config{say: func(format string, args ...any) { fmt.Fprintf(os.Stderr, "release: "+format+"\n", args...) }}
	var out, archives, verify string
	flag.StringVar(&out, "out", "release", "`FOLDER` of the release; an earlier release in it is replaced")
	flag.StringVar(&c.source, "source", ".", "`FOLDER` of the repository")
	flag.StringVar(&c.version, "version", "", "version of the release; if empty, as git describe prints it")
	flag.StringVar(&c.lock, "packages", "builder/release/packages.lock",
		"`FILE` that lists the builder image's Debian packages")
	flag.StringVar(&archives, "archive", "",
		"`URLS` of Debian archives with these packages, separated by commas; if empty, those of this machine's apt")
	flag.StringVar(&c.cache, "cache", "",
		"`FOLDER` that keeps downloaded packages; if empty, PREBAKE_STATE/release, or prebake/release in the user's "+
			"cache folder")
	flag.StringVar(&c.key, "key", "", "signing `KEY`: a file or a KMS URI; if empty, a new key that is not kept")
	flag.StringVar(&c.builderID, "builder-id", "https://prebake.dev/release",
		"`URI` that names the builder of the release in the provenance")
	flag.StringVar(&verify, "verify", "", "only check the release in -out, with the public keys in `FILE`; make nothing")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, c, out, archives, verify)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		if hint := fault.Hint(err); hint != "" {
			fmt.Fprintln(os.Stderr, "hint:", hint)
		}
		os.Exit(1)
	}
}

// defaultCache returns the folder that keeps downloaded packages. It is in the folder of the Makefile's STATE, so that
// make clean-cache removes it.
func defaultCache() (string, error) {
	if state := os.Getenv("PREBAKE_STATE"); state != "" {
		return filepath.Join(state, "release"), nil
	}
	user, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(user, "prebake", "release"), nil
}

func run(ctx context.Context, c config, out, archives, verify string) error {
	if verify != "" {
		keys, err := os.ReadFile(verify)
		if err != nil {
			return err
		}
		signer, err := verifyRelease(out, keys)
		if err != nil {
			return err
		}
		c.say("%s is complete, and signed by key %s", out, signer)
		return nil
	}
	if archives != "" {
		c.archives = strings.Split(archives, ",")
	}
	if c.cache == "" {
		dir, err := defaultCache()
		if err != nil {
			return err
		}
		c.cache = dir
	}
	c.arches = []string{"amd64", "arm64"}
	if err := c.checkGo(ctx, runtime.Version()); err != nil {
		return err
	}
	if err := c.readCommit(ctx); err != nil {
		return err
	}
	return assemble(ctx, c, out)
}
