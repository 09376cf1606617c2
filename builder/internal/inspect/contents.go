package inspect

import (
	"context"
	"errors"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/builder/internal/kconfig"
	"github.com/prebake/prebake/builder/internal/modsign"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
)

// maxEnv is the maximum number of bytes of toolchain_env that are reported.
const maxEnv = 16 << 10

// contents reports what each input contains, after [cossrc.Fetch] refused one of them. cause is the error of Fetch.
func (l *inspection) contents(ctx context.Context, cause error, c Config) {
	for _, at := range cosbucket.Layouts(l.kernel, cosbucket.ToolchainEnvName(l.kernel)) {
		text, err := l.bucket.ReadSmall(ctx, at, maxEnv)
		if err == nil {
			l.note("toolchain_env", "%q", text)
			break
		}
		if !fault.Is(err, fault.InputMissing) { // the findings about objects say what is missing
			l.problem("toolchain_env", err, cause)
		}
	}
	headers, err := cossrc.HeadersContents(ctx, l.bucket, l.cache, l.kernel, c.Progress)
	l.archive("headers", headers)
	if headers.Material.Name != "" {
		l.note("headers", "files that a build reads: %s; UTS_RELEASE: %q", some(headers.Files, maxNames), headers.Release)
	}
	l.problem("headers", err, cause)
	if headers.Config != nil {
		if config, err := kconfig.Parse(headers.Config); err != nil {
			l.problem("configuration", err, cause)
		} else {
			l.configuration(config)
		}
	}
	toolchain, err := cossrc.ToolchainContents(ctx, l.bucket, l.cache, l.kernel, c.Progress)
	l.archive("toolchain", toolchain)
	if toolchain.Material.Name != "" {
		l.note("toolchain", "compilers and linkers: %s", some(toolchain.Programs, maxNames))
	}
	l.problem("toolchain", err, cause)
}

// archive reports the layout of an archive.
func (l *inspection) archive(check string, c cossrc.Contents) {
	if c.Material.Name != "" {
		l.note(check, "%s, %s, %s, %d entries; folders: %s", c.Material.URI, bytes(c.Material.Size),
			or(string(c.Format), "unknown format"), c.Entries, some(c.Folders, maxNames))
	}
}

// problem reports the error of a part. It reports nothing if cause, which the findings already contain, includes this
// error.
func (l *inspection) problem(check string, err, cause error) {
	if err != nil && !strings.Contains(cause.Error(), err.Error()) {
		l.note(check, "%v", err)
	}
}

// signatures reports whether Google's signatures are by a key that the kernel trusts. own has the names of the COS
// build's objects. If own is nil, signatures tries the given versions. It fetches at most one archive of signed
// modules, because such an archive may have hundreds of megabytes.
func (l *inspection) signatures(ctx context.Context, own, versions []string, c Config) {
	modules := versions
	if own != nil {
		versions, modules = nil, nil
		for _, name := range slices.Backward(own) { // the newest versions sort last
			if version := signatureVersion(name); version != "" {
				versions = append(versions, version)
			}
			if m := ofDrivers.FindStringSubmatch(name); m != nil && m[1] != "" {
				modules = append(modules, m[1])
			}
		}
	}
	for _, version := range versions[:min(len(versions), maxVersions)] {
		if err := l.detached(ctx, version); err != nil {
			l.fail("signatures", doctor.Warn, err)
		}
	}
	for _, version := range modules {
		err := l.signedModules(ctx, version, c)
		if own == nil && fault.Is(err, fault.InputMissing) {
			continue
		}
		if err != nil {
			l.fail("signatures", doctor.Warn, err)
		}
		return
	}
}

// signatureVersion returns the driver version of an archive with Google's signatures, or "".
func signatureVersion(name string) string {
	base, ok := strings.CutPrefix(name, "extensions/gpu/")
	if !ok {
		return ""
	}
	if version, ok := strings.CutSuffix(base, ".signature.tar.gz"); ok {
		return version
	}
	if rest, ok := strings.CutSuffix(base, "-signature.tar.gz"); ok {
		version, _ := strings.CutPrefix(rest, "nvidia-drivers-")
		return version
	}
	return ""
}

// detached checks who made the signatures of one driver version.
func (l *inspection) detached(ctx context.Context, version string) error {
	s, err := cossrc.FetchSignatures(ctx, l.bucket, l.cache, l.kernel, version)
	if err != nil || s == nil {
		return err
	}
	d, err := modsign.ReadDetached(strings.NewReader(string(s.Archive)), s.TrustedKey)
	if err != nil {
		return err
	}
	names, err := d.CheckSigners()
	if err != nil {
		return err
	}
	by := "trusted_key.pem certifies the signers"
	if s.TrustedKey == nil {
		by = "the bucket has no trusted_key.pem, so it is unknown whether the kernel trusts the signers"
	}
	l.ok("signatures", "%s: of %s; %s; whether they fit is known only after a compile", path.Base(s.Materials[0].Name),
		some(names, maxNames), by)
	return nil
}

// signedModules verifies the modules that Google compiled and signed for one driver version.
func (l *inspection) signedModules(ctx context.Context, version string, c Config) (err error) {
	d, err := cossrc.FetchSignedDriver(ctx, l.bucket, l.cache, l.kernel, version, c.Progress)
	if err != nil {
		return err
	}
	name := d.Materials[0].Name
	if d.TrustedKey == nil {
		l.note("signatures", "%s: not verified, because the bucket has no trusted_key.pem", name)
		return nil
	}
	trusted, err := modsign.ParseCertificates(d.TrustedKey)
	if err != nil {
		return err
	}
	dir, cleanup, err := l.cache.TempDir("inspect-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	f, err := os.Open(d.Archive)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := modsign.UnpackSigned(f, dir, trusted)
	if err != nil {
		return err
	}
	l.ok("signatures", "%s: modules %s; each has a valid signature by a key that trusted_key.pem certifies", name,
		some(names, maxNames))
	return nil
}
