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

// TestDockerfilePlatform checks that docker build --platform, which a Dockerfile's comment gives, runs no program of
// another architecture: each stage with a RUN must be of the machine that builds.
func TestDockerfilePlatform(t *testing.T) {
	t.Parallel()
	found := 0
	for _, name := range []string{"Dockerfile.builder", "Dockerfile.fetcher"} {
		text := read(t, name)
		if !strings.Contains(text, "# --platform ") {
			continue
		}
		found++
		for stage := range strings.SplitSeq(text, "\nFROM ") {
			from, commands, _ := strings.Cut(stage, "\n")
			if strings.Contains("\n"+commands, "\nRUN ") && !strings.HasPrefix(from, "--platform=$BUILDPLATFORM ") {
				t.Errorf("%s runs programs in the stage FROM %s; want --platform=$BUILDPLATFORM there", name, from)
			}
		}
	}
	if found != 1 {
		t.Errorf("%d Dockerfiles have --platform in their comments; want Dockerfile.fetcher", found)
	}
}
