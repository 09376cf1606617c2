package pipeline

import (
	"context"
	"fmt"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/fault"
)

// FactBTF is the name of a fact in the provenance: the version of pahole that made the modules' BTF. Without BTF there
// is no such fact.
const FactBTF = "btf"

// KernelOptions returns the optional inputs of a kernel that this Config needs.
func (c Config) KernelOptions() []cossrc.Option {
	if c.BTF {
		return []cossrc.Option{cossrc.WithBTF()}
	}
	return nil
}

// findPahole returns the version of this machine's program pahole, or "" if the modules get no BTF. Another version may
// make other bytes. So findPahole returns an error if the request asks for a version that this machine does not have.
func (r *run) findPahole(ctx context.Context, kernel *cossrc.Inputs) (version string, err error) {
	if kernel.BTF == "" {
		return "", nil
	}
	if version, err = compile.Pahole(ctx); err != nil {
		return "", err
	}
	if want := r.req.BTF; want != "" && want != version {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("the published modules have BTF by pahole %s, but this machine has pahole %s", want, version),
			hintPahole(want))
	}
	return version, nil
}

// hintPahole returns the hint for a build that needs another version of pahole.
func hintPahole(want string) string { return "install pahole " + want + " (package dwarves)" }
