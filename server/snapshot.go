package main

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// snapshotFile matches the paths of the files that the command builder snapshot writes.
var snapshotFile = regexp.MustCompile(
	`^(timestamp\.json|[1-9][0-9]*\.(root|targets|snapshot)\.json|targets/[0-9a-f]{64}\.catalogue\.json\.zst)$`,
)

// snapshotFiles returns a handler that serves the files of a snapshot from a folder. The server does not verify the
// files; each node does.
func snapshotFiles(dir string) (http.Handler, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fault.Wrap(
			fault.Usage,
			fmt.Errorf("open the snapshot: %w", err),
			"give --snapshot the folder that the command \"builder snapshot make\" wrote",
		)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/snapshot/")
		if !snapshotFile.MatchString(name) {
			http.NotFound(w, r)
			return
		}
		info, err := root.Stat(name) // before Open, because opening a named pipe waits for a writer
		if err != nil || !info.Mode().IsRegular() {
			http.NotFound(w, r)
			return
		}
		f, err := root.Open(name)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		defer f.Close()
		w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		if name == "timestamp.json" {
			w.Header().Set("Cache-Control", "no-cache")
		}
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(name, ".zst") {
			w.Header().Set("Content-Type", "application/zstd")
		}
		http.ServeContent(w, r, "", info.ModTime(), f)
	}), nil
}
