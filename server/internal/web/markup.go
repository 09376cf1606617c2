package web

import (
	"html"
	"html/template"
	"net/url"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/target"
)

// This file makes the HTML of the matrix. A template would take ten times as long.

// markup collects HTML.
type markup struct{ strings.Builder }

// put adds HTML and text in turn, beginning with HTML. It escapes the text.
func (m *markup) put(pieces ...string) {
	for i, p := range pieces {
		if i%2 == 1 {
			p = html.EscapeString(p)
		}
		m.WriteString(p)
	}
}

// safe returns the collected HTML, with all text escaped.
func (m *markup) safe() template.HTML { return template.HTML(m.String()) }

// cellPath returns the path of a cell's page. Without a flavour, it returns the path of the page about both cells of a
// driver version.
func cellPath(k target.Kernel, version string, flavour target.Flavour) string {
	path := "/cells/" + url.PathEscape(k.Board) + "/" + url.PathEscape(k.BuildID) + "/" + url.PathEscape(version)
	if flavour != "" {
		path += "/" + url.PathEscape(string(flavour))
	}
	return path
}

// cells returns the table cells of a kernel's row, one for each driver version.
func cells(k api.Kernel, drivers []api.DriverRelease, all [][]api.Resolution) template.HTML {
	var out markup
	for i, both := range all {
		pill(&out, k.Kernel, drivers[i].Version, both)
	}
	return out.safe()
}

// pill adds the table cell of a driver version. The table cell shows the flavours that were requested. If none was, it
// shows the flavours that can be built, or else both.
func pill(out *markup, k target.Kernel, version string, both []api.Resolution) {
	shown := both[:0:0]
	for _, least := range []func(api.State) bool{
		func(s api.State) bool { return s != api.Unknown && s != api.Unsupported },
		func(s api.State) bool { return s == api.Unknown },
		func(api.State) bool { return true },
	} {
		for _, c := range both {
			if least(c.State) {
				shown = append(shown, c)
			}
		}
		if len(shown) > 0 {
			break
		}
	}
	idle := shown[0].State == api.Unknown || shown[0].State == api.Unsupported
	out.put(`<td data-driver="`, version, `"`)
	if idle {
		out.put(` class="idle"`)
	}
	out.put(`><a href="`, cellPath(k, version, ""), `" class="pill">`)
	if same := len(shown) == 2 && shown[0].State == shown[1].State; same || idle {
		half(out, shown[0].State, "")
	} else {
		for _, c := range shown {
			half(out, c.State, string(c.Driver.Flavour))
		}
	}
	out.put("</a></td>\n")
}

// half adds one flavour to a table cell. The style sheet adds the symbol of the state.
func half(out *markup, s api.State, flavour string) {
	out.put(`<span class="`, string(s), `">`)
	if flavour != "" {
		out.put(`<b>`, flavour, `</b> `)
	}
	out.put(`<em>`, label(s), `</em></span>`)
}

// kernelHead returns the head of a kernel's row.
func kernelHead(k api.Kernel) template.HTML {
	var out markup
	out.put(`<th scope="row">`, k.BuildID, `<small>`, k.Board)
	if k.Release != "" {
		out.put(` · `, k.Release)
	}
	if n := len(k.GKE); n > 0 {
		out.put(` · GKE `, k.GKE[0])
		if n > 1 {
			out.put(` and `, strconv.Itoa(n-1), ` more`)
		}
	}
	out.put(`</small></th>`)
	return out.safe()
}

// share returns a part of a whole in percent. It never rounds a smaller part to 100 %.
func share(part, whole int) string {
	if part == whole {
		return "100 %"
	}
	return strconv.FormatFloat(min(99.9, float64(part)*100/float64(whole)), 'f', 1, 64) + " %"
}
