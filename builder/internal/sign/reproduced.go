package sign

import (
	"fmt"

	"github.com/prebake/prebake/pkg/trust"
)

// ReproducedFacts is what such a statement says beside the cell.
type ReproducedFacts struct {
	// By names who made it again, a URI; Builder is who built it first.
	By, Builder string
	// Recipes are the ways in which it was made.
	Recipes map[string]string
}

// Reproduced states "rebuilt, identical" about the artifact with this manifest
// digest. There is no such statement with another outcome.
func Reproduced(digest string, built trust.Parameters, f ReproducedFacts) (Statement, error) {
	predicate, err := toStruct(map[string]any{
		"result": "identical", "rebuilder": map[string]string{"id": f.By}, "builder": map[string]string{"id": f.Builder},
		"kernel": built.Kernel, "fingerprint": built.Fingerprint, "driver": built.Driver, "recipes": f.Recipes,
	})
	if err != nil {
		return Statement{}, fmt.Errorf("make reproduction statement: %w", err)
	}
	s, err := newStatement(digest, built.Driver, trust.PredicateReproduced, predicate)
	if err != nil {
		return Statement{}, fmt.Errorf("make reproduction statement: %w", err)
	}
	return s, nil
}
