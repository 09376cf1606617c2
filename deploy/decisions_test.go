package deploy_test

import (
	"strings"
	"testing"
)

// TestDecisionLength checks that each decision fits on a page. Longer texts belong to reference or background.
func TestDecisionLength(t *testing.T) {
	t.Parallel()
	const most = 800
	for _, name := range files(t, ".md") {
		if strings.HasPrefix(name, "docs/decisions/0") {
			if words := len(strings.Fields(read(t, name))); words > most {
				t.Errorf("%s has %d words; want at most %d: move details to docs/reference or docs/background", name, words, most)
			}
		}
	}
}
