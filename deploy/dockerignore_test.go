package deploy_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDockerignore checks that .dockerignore lets the Dockerfiles copy what they name below bin, for each architecture.
func TestDockerignore(t *testing.T) {
	t.Parallel()
	kept := strings.Fields(read(t, ".dockerignore"))
	program := regexp.MustCompile(`bin/\S+`)
	found := 0
	for _, name := range []string{"Dockerfile.builder", "Dockerfile.fetcher"} {
		for line := range strings.Lines(read(t, name)) {
			if !strings.HasPrefix(line, "COPY bin/") {
				continue
			}
			for _, source := range program.FindAllString(line[:strings.LastIndex(line, " ")], -1) {
				for _, suffix := range []string{"", "-arm64"} { // as deploy/images.sh sets SUFFIX
					found++
					if file := strings.ReplaceAll(source, "${SUFFIX}", suffix); !slices.Contains(kept, "!"+file) {
						t.Errorf("%s copies %s, which .dockerignore leaves out", name, file)
					}
				}
			}
		}
	}
	if found < 12 {
		t.Errorf("found %d programs; want 12 or more", found)
	}
}
