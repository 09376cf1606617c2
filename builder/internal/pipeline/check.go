package pipeline

import (
	"context"

	"github.com/prebake/prebake/builder/internal/modcheck"
	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/target"
)

// check runs the static checks: it compares every module with the kernel for which the module was made.
func (r *run) check(ctx context.Context, in *inputs, m *modules) (id bundle.Identity, vermagic string, err error) {
	if err := r.checkIntact(ctx, m); err != nil {
		return id, "", err
	}
	kernel := modcheck.Kernel{
		Headers: in.kernel.Headers, Boot: in.kernel.Boot, Release: in.kernel.Kernel.Release, Arch: in.kernel.Kernel.Arch,
		Fingerprint: in.kernel.Fingerprint, Version: in.driver.Modules().Version, BTF: in.kernel.BTF,
		Open: in.driver.Flavour == target.Open,
	}
	if m.signer.byGoogle() {
		kernel.Fingerprint = "" // modules that Google signed have no stamp, the ELF note with the fingerprint
	}
	vermagic, err = modcheck.Check(m.files, kernel)
	if err != nil {
		return id, "", err
	}
	id = bundle.Identity{
		Fingerprint: in.kernel.Fingerprint, Arch: in.kernel.Kernel.Arch, Release: in.kernel.Kernel.Release,
		Vermagic: vermagic, Driver: in.driver,
	}
	return id, vermagic, nil
}

// staticChecks returns the checks that passed before the load test, as texts for the signed test result.
func staticChecks(in *inputs, m *modules) []string {
	origin := "stamp of the kernel's fingerprint"
	if m.signer.byGoogle() {
		origin = "Google's signature of every module, for this COS build and over these bytes"
	}
	all := []string{
		"module names, driver version and processor", "size of struct module, if a module of the kernel shows it", "vermagic",
		origin, "build salt",
		"order of dependencies", "every imported symbol is exported by the kernel or by a module of the driver",
		"symbol checksums, if the kernel has them",
	}
	if in.driver.Flavour == target.Open {
		all = append(all, "every module has a licence that does not taint the kernel")
	}
	if in.kernel.BTF != "" {
		all = append(all, "BTF of every module continues the kernel's BTF")
	}
	return all
}
