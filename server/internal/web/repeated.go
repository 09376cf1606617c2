package web

import (
	"html"
	"html/template"
	"strings"

	"github.com/prebake/prebake/pkg/api"
)

// This file makes what a page of the matrix has hundreds of: a template takes ten
// times as long for each.

// markup collects HTML.
type markup struct{ strings.Builder }

// put adds pieces of HTML and, in turn, texts, which are escaped: the first piece is
// HTML, the second a text, and so on.
func (m *markup) put(pieces ...string) {
	for i, p := range pieces {
		if i%2 == 1 {
			p = html.EscapeString(p)
		}
		m.WriteString(p)
	}
}

// cells makes the cells of a kernel's row, one for each driver with both flavours.
func cells(k api.Kernel, all [][]api.Resolution) template.HTML {
	var out markup
	for _, both := range all {
		out.put("<td>")
		for _, c := range both {
			to, end := link(c), "</span></span>"
			if to == "" {
				out.put(`<span class="cell `, string(c.State))
			} else {
				out.put(`<a class="cell `, string(c.State), `" href="`, to)
				end = "</span></a>"
			}
			out.put(`" title="`, why(k, c), `"><span class="flavour">`, string(c.Driver.Flavour), `</span><span class="is">`)
			out.put(`<span aria-hidden="true">`, mark(c.State), `</span> `, label(c.State), end)
		}
		out.put("</td>")
	}
	return template.HTML(out.String())
}

// cards makes the list of artifacts. host is the name that the reader reached the
// server by.
func cards(host string, all []api.Artifact) template.HTML {
	var out markup
	for _, a := range all {
		state := string(a.State)
		out.put(
			`<article id="`,
			anchor(a.Digest),
			"\" class=\"card\">\n<h3>",
			a.Driver.Version,
			" ",
			string(a.Driver.Flavour),
			` <span class="state `,
			state,
			`"><span aria-hidden="true">`,
			mark(a.State),
			`</span> `,
			label(a.State),
			"</span></h3>\n",
		)
		if a.Reason != "" {
			out.put(`<p class="reason">`, a.Reason, "</p>\n")
		}
		if a.State == api.Yanked {
			out.put(`<p class="facts"><code>`, a.Digest, "</code></p>\n")
		} else {
			out.put(`<pre class="copy" tabindex="0" aria-label="Command that pulls the artifact">crane pull `, reference(host, a),
				" driver.tar</pre>\n")
		}
		names := make([]string, len(a.Kernels))
		for i, k := range a.Kernels {
			names[i] = k.String()
		}
		out.put(`<p class="facts">for `, strings.Join(names, ", "), " · ", string(a.Arch), ` · abi <code title="`,
			string(a.Fingerprint), `">`, short(a.Fingerprint), `</code> · <time datetime="`, date(a.PublishedAt), `">`,
			when(a.PublishedAt), "</time></p>\n</article>\n")
	}
	return template.HTML(out.String())
}
