// Package browser checks the server's pages as a reader sees them. playwright-core opens the pages in Chromium: on a
// desktop, on a phone, in dark mode and without JavaScript. The tests run with three data sets: an empty one, a small
// one, and one with 60,000 cells.
package browser

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// maxWeight is the largest permitted size of a page with all its resources, in bytes, uncompressed.
const maxWeight = 100_000

var variable = regexp.MustCompile(`\{([a-z]+)\}`)

// urlIn returns the URL of a page in a data set; ok is false if the set has no such page.
func (r row) urlIn(s *set) (url string, ok bool) {
	ok = len(r.Sets) == 0 || slices.Contains(r.Sets, s.Name)
	return s.URL + variable.ReplaceAllStringFunc(r.Path, func(v string) string {
		value := s.Vars[strings.Trim(v, "{}")]
		ok = ok && value != ""
		return value
	}), ok
}

func TestPages(t *testing.T) {
	d, sets := startDriver(t), startSets(t)
	titles := map[string]string{}
	for _, r := range pages {
		t.Run(r.Name, func(t *testing.T) {
			waiting, ran, all := map[string]bool{}, 0, 0
			for _, s := range sets {
				url, ok := r.urlIn(s)
				if !ok {
					continue
				}
				all++
				t.Run(s.Name, func(t *testing.T) {
					ran++
					for _, f := range checkPage(t, d, r, s, url, titles) {
						if _, waits := r.Waits[f.Check]; waits {
							waiting[f.Check] = true
							continue
						}
						t.Errorf("GET %s, %s, %s: %s", strings.TrimPrefix(url, s.URL), f.View, f.Check, f.Text)
					}
				})
			}
			if all == 0 {
				t.Errorf("page %s is in no data set; want one at least", r.Name)
			}
			for _, check := range slices.Sorted(maps.Keys(r.Waits)) {
				if !waiting[check] && ran == all {
					t.Errorf("page %s passes %s, which waits: take it out of Waits", r.Name, check)
				}
			}
		})
	}
}

// checkPage returns the findings about a page. titles maps each title of a set to the page that has it.
func checkPage(t *testing.T, d *driver, r row, s *set, url string, titles map[string]string) []finding {
	t.Helper()
	if r.Missing {
		if a := d.ask(t, question{Do: "status", URL: url}); a.Status != 404 {
			text := fmt.Sprintf("%d; want 404 of a page that is missing: take Missing out of its row", a.Status)
			return []finding{{"", "status", text}}
		}
		return nil
	}
	q := question{Do: "page", URL: url, Status: 200, Sticky: r.Sticky, Large: s.Name == "large"}
	if r.Kind == "feed" || r.Kind == "badge" {
		q.Do = r.Kind
	}
	if r.Status != 0 {
		q.Status = r.Status
	}
	a := d.ask(t, q)
	t.Logf("%d bytes; title %q", a.Weight, a.Title)
	if a.Weight > maxWeight {
		text := fmt.Sprintf("%d bytes; want %d at most", a.Weight, maxWeight)
		a.Findings = append(a.Findings, finding{"desktop", "weight", text})
	}
	if q.Do == "page" && !r.SharesTitle {
		key := s.Name + ": " + a.Title
		if other := titles[key]; other != "" || a.Title == "" {
			text := fmt.Sprintf("%q, as on page %q; want one of its own", a.Title, other)
			a.Findings = append(a.Findings, finding{"desktop", "title", text})
		}
		titles[key] = r.Name
	}
	return a.Findings
}

// TestDraw makes screenshots of the pages in all sets, for desktop, phone and dark mode. PREBAKE_SCREENSHOTS is their
// folder. Without it, the test draws only one page, to check that drawing works.
func TestDraw(t *testing.T) {
	dir := os.Getenv("PREBAKE_SCREENSHOTS")
	draw, names := pages, []string{"empty", "small", "large"}
	if dir == "" {
		dir, draw, names = t.TempDir(), draw[:1], names[:1]
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	d := startDriver(t)
	for _, s := range startSets(t, names...) {
		for _, r := range draw {
			url, ok := r.urlIn(s)
			if !ok || !r.Draw || r.Missing {
				continue
			}
			file := filepath.Join(dir, s.Name+"-"+r.Name)
			d.ask(t, question{Do: "draw", URL: url, File: file})
			for _, view := range []string{"desktop", "phone", "dark"} {
				if info, err := os.Stat(file + "-" + view + ".png"); err != nil || info.Size() == 0 {
					t.Errorf("draw %s: %v, %v; want an image", file, info, err)
				}
			}
		}
	}
}
