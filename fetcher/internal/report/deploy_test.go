package report_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prebake/prebake/fetcher/internal/report"
)

// TestMetricsOfDeploy checks that the fetcher prints each of its metrics that our alerts and dashboard use.
func TestMetricsOfDeploy(t *testing.T) {
	t.Parallel()
	w := httptest.NewRecorder()
	report.New(time.Now).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	paths, err := filepath.Glob("../../../deploy/kubernetes/components/monitoring/*")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`\bprebake_fetcher_\w+`).FindAllString(string(text), -1) {
			found++
			if !strings.Contains(w.Body.String(), "\n"+name+" ") {
				t.Errorf("%s names %s; the fetcher prints:\n%s", filepath.Base(path), name, w.Body)
			}
		}
	}
	if found == 0 {
		t.Errorf("no metric of the fetcher in %d files; want some", len(paths))
	}
}
