package browser

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestChecksFindFaults checks that the checks find the faults of some faulty pages, and none in sound ones.
func TestChecksFindFaults(t *testing.T) {
	served := http.FileServer(http.Dir("testdata"))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/loose.html": // this page has no content security policy, so that its scripts run
			r.URL.Path = "/faulty.html"
		case "/faulty.html":
			w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		case "/faulty.atom":
			w.Header().Set("Content-Type", "text/xml")
		case "/sound.atom":
			w.Header().Set("Content-Type", "application/atom+xml; charset=utf-8")
		}
		served.ServeHTTP(w, r)
	}))
	defer server.Close()
	d := startDriver(t)
	type texts map[string][]string // parts of the findings' texts, by check
	rows := []struct {
		name string
		q    question
		want texts
	}{
		{"policy", question{Do: "page", URL: "/faulty.html", Status: 200}, texts{
			"csp": {"inline script", "image"}, "hosts": {"127.0.0.2:9"},
			// The page is wider than a desktop.
			"width":    {"the document is 2000 px wide", "div.wide"},
			"targets":  {`a.plain "1" is`, "hidden behind a box", "Dead without JavaScript", "not reached by Tab"},
			"keyboard": {`"1" looks the same with the focus`, `"hidden behind a box" has the focus and cannot be seen`},
			"noscript": {"Dead without JavaScript"},
			"axe":      {"color-contrast"},
		}},
		{"scripts", question{Do: "page", URL: "/loose.html", Status: 404, Sticky: "thead th", Large: true}, texts{
			"status": {"200; want 404"}, "console": {"a mistake", "another one"}, "hosts": {"127.0.0.2:9"},
			"width": {"div.wide"}, "targets": {"a.plain"}, "keyboard": {"a.plain"}, "axe": {"color-contrast"},
			"sticky": {`th "Head" is at -`}, "noscript": {"1 rows are shown; with JavaScript it is 101"},
		}},
		{"no table", question{Do: "page", URL: "/faulty.html", Status: 200, Sticky: "table.none", Large: true}, texts{
			"sticky": {"there is no table.none"},
		}},
		{"feed", question{Do: "feed", URL: "/faulty.atom", Status: 404}, texts{
			"status": {"200; want 404"},
			"feed": {"text/xml", `id "not an IRI"`, "yesterday", "urn:x:1 is there twice", "link without href",
				"rel=self", "no author", "rel=alternate"},
		}},
		{"no XML", question{Do: "feed", URL: "/faulty.html", Status: 200}, texts{"feed": {"it is no XML"}}},
		{"another root", question{Do: "feed", URL: "/faulty.svg", Status: 200}, texts{"feed": {"its root is svg"}}},
		{"badge", question{Do: "badge", URL: "/faulty.svg", Status: 200}, texts{
			"badge": {"no title", "more than shapes"},
		}},
		{"no SVG", question{Do: "badge", URL: "/faulty.atom", Status: 200}, texts{
			"badge": {"text/xml", "its root is feed"},
		}},
		{"sound feed", question{Do: "feed", URL: "/sound.atom", Status: 200}, nil},
		{"sound badge", question{Do: "badge", URL: "/sound.svg", Status: 200}, nil},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			row.q.URL = server.URL + row.q.URL
			got := map[string]string{}
			for _, f := range d.ask(t, row.q).Findings {
				got[f.Check] += f.View + ": " + f.Text + "\n"
			}
			if row.name != "no table" { // the page of that row has more faults, which the row "policy" checks
				want := slices.Sorted(maps.Keys(row.want))
				if diff := cmp.Diff(want, slices.Sorted(maps.Keys(got))); diff != "" {
					t.Errorf("checks that find something (-want +got):\n%s\n%v", diff, got)
				}
			}
			for check, pieces := range row.want {
				for _, piece := range pieces {
					if !strings.Contains(got[check], piece) {
						t.Errorf("check %s found %s; want %q", check, got[check], piece)
					}
				}
			}
			if strings.Contains(got["targets"], "in a sentence") {
				t.Errorf("check targets found %s; want no link in a sentence", got["targets"])
			}
		})
	}
}
