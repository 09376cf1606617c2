package pipeline

import (
	"context"
	"fmt"

	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/cossrc"
	"github.com/prebake/prebake/pkg/fault"
)

// FactBTF is the name under which the provenance lists the version of the pahole
// that made the modules' BTF; modules without have no such fact.
const FactBTF = "btf"

// KernelOptions are what has to be fetched of a kernel beside what every build needs.
func (c Config) KernelOptions() []cossrc.Option {
	if c.BTF {
		return []cossrc.Option{cossrc.WithBTF()}
	}
	return nil
}

// findPahole settles who makes the modules' BTF, where some is to be made.
// Another version makes other bytes.
func (r *run) findPahole(ctx context.Context, kernel *cossrc.Inputs) (version string, err error) {
	if kernel.BTF == "" {
		return "", nil
	}
	if version, err = compile.Pahole(ctx); err != nil {
		return "", err
	}
	if want := r.req.BTF; want != "" && want != version {
		return "", fault.New(fault.Unsupported,
			fmt.Sprintf("the modules' BTF was made by pahole %s; this machine has %s", want, version),
			"install that version of dwarves")
	}
	return version, nil
}
