package sign

import (
	"fmt"

	"github.com/prebake/prebake/pkg/trust"
)

// ReproducedFacts is the content of a reproduction statement, in addition to the cell.
type ReproducedFacts struct {
	// By is the URI of the builder that reproduced the artifact. Builder is the URI of the first builder.
	By, Builder string
	// Recipes maps each step of the build, such as "compile", to the version of the step's code in the rebuild.
	Recipes map[string]string
}

// Reproduced makes the statement that a rebuild gave the identical artifact with this manifest digest.
func Reproduced(digest string, built trust.Parameters, f ReproducedFacts) (Statement, error) {
	predicate, err := toStruct(map[string]any{
		"result": "identical", "rebuilder": map[string]string{"id": f.By}, "builder": map[string]string{"id": f.Builder},
		"kernel": built.Kernel, "fingerprint": built.Fingerprint, "driver": built.Driver, "recipes": f.Recipes,
	})
	if err != nil {
		return Statement{}, fmt.Errorf("write the statement that the build was reproduced: %w", err)
	}
	s, err := newStatement(digest, built.Driver, trust.PredicateReproduced, predicate)
	if err != nil {
		return Statement{}, fmt.Errorf("write the statement that the build was reproduced: %w", err)
	}
	return s, nil
}
