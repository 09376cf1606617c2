package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/prebake/prebake/builder/internal/licence"
	"github.com/prebake/prebake/builder/internal/sign"
	"github.com/prebake/prebake/builder/internal/tarball"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/sandbox"
)

// Real returns the functions and facts of this machine. rule decides which destinations may get artifacts, options
// returns a destination's registry options, and keys are options for loading a signing key.
func Real(rule licence.Rule, options func(destination string) registry.Options, keys ...sign.Option) Machine {
	return Machine{
		Program: func(name string) bool {
			for _, dir := range []string{"/usr/bin", "/bin", "/usr/sbin", "/sbin"} {
				if executable(filepath.Join(dir, name)) == nil {
					return true
				}
			}
			return false
		},
		Library: func(name string) bool {
			for _, dir := range []string{"/usr/lib/*", "/lib/*", "/usr/lib64", "/lib64", "/usr/lib", "/lib"} {
				if found, err := filepath.Glob(filepath.Join(dir, name)); err == nil && len(found) > 0 {
					return true
				}
			}
			return false
		},
		Executable: executable,
		Sandbox:    sandbox.Probe,
		Limits:     sandbox.SupportedLimits,
		Memory:     sandbox.AvailableMemory(),
		Processors: runtime.GOMAXPROCS(0), // includes the limit of a control group
		Cache:      openCache,
		KVM:        unix.Access("/dev/kvm", unix.R_OK|unix.W_OK) == nil,
		Now:        time.Now, Synchronised: synchronised(),
		Mirror: checkReachable, MayGo: mayPublish(rule, options),
		Destination: func(ctx context.Context, name string) error { return checkPublish(ctx, name, options) },
		Key: func(ctx context.Context, ref string) error {
			_, err := sign.LoadSigner(ctx, ref, keys...)
			return err
		},
	}
}

// checkPublish returns an error if this user may not publish to a destination.
func checkPublish(ctx context.Context, name string, options func(destination string) registry.Options) error {
	if tarball.Is(name) {
		return tarball.CheckWrite(ctx, name)
	}
	return registry.CheckPush(ctx, name, options(name))
}

func executable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || unix.Access(path, unix.X_OK) != nil {
		return fmt.Errorf("%s is not a program that this user may run", path)
	}
	return nil
}

func openCache(dir string) (free int64, err error) {
	c, err := cas.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
			err = fault.Wrap(fault.Usage, err, "give --cache a folder that this user may write")
		}
		return 0, err
	}
	free, err = c.Free()
	return free, errors.Join(err, c.Close())
}

// synchronised reports whether the kernel considers its clock synchronised, for example by an NTP service.
func synchronised() bool {
	state, err := unix.Adjtimex(&unix.Timex{})
	return err == nil && state != unix.TIME_ERROR
}

// checkReachable returns an error if a bucket cannot be read. A bucket that reports an object as missing can be read.
func checkReachable(ctx context.Context, url string) (err error) {
	b, err := cosbucket.Open(ctx, url)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	_, err = b.ReadSmall(ctx, "prebake-doctor/no-such-object", 1)
	if fault.Is(err, fault.InputMissing) {
		return nil
	}
	return err
}
