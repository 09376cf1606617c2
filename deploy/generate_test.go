package deploy_test

import (
	"path"
	"regexp"
	"strings"
	"testing"
)

// notGenerated are the folders whose tests can write a file, which is not part of the documentation.
var notGenerated = map[string]string{
	"builder/internal/tarball": "a sample bucket: if it changes, readers of former buckets must be looked at first",
}

// TestGenerateWritesEverything checks that make generate runs each test that writes part of the documentation, with the
// flag that makes it write.
func TestGenerateWritesEverything(t *testing.T) {
	t.Parallel()
	flagOf := regexp.MustCompile(`flag\.Bool\("(update|write-page)", false`)
	var runs []string
	for line := range strings.Lines(makeCommands(t, "generate")) {
		if strings.Contains(line, " test ") {
			runs = append(runs, line+" ")
		}
	}
	found := 0
	for _, name := range files(t, "_test.go") {
		for _, m := range flagOf.FindAllStringSubmatch(read(t, name), -1) {
			folder, written := path.Dir(name), false
			if notGenerated[folder] != "" {
				continue
			}
			found++
			for _, line := range runs {
				written = written || strings.Contains(line, " ./"+folder+" ") && strings.Contains(line, " -"+m[1])
			}
			if !written {
				t.Errorf("%s has the flag -%s, and make generate does not run its tests with the flag", name, m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("%d flags that write files were found; want 10 or more", found)
	}
}

// TestGenerateFindsPrograms checks that the folder into which go generate installs programs is on its PATH. The folder
// bin of GOPATH, which is the default, mostly is not.
func TestGenerateFindsPrograms(t *testing.T) {
	t.Parallel()
	commands := makeCommands(t, "generate")
	m := regexp.MustCompile(`(?m)^GOBIN="(/\S+)" PATH="([^":]+):[^"]*" go generate `).FindStringSubmatch(commands)
	if m == nil || m[1] != m[2] {
		t.Errorf("make generate calls go generate without a GOBIN that is first on PATH:\n%s", commands)
	}
}
