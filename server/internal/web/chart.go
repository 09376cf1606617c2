package web

import (
	"fmt"
	"html/template"
	"strconv"

	"github.com/prebake/prebake/pkg/api"
)

// This file draws charts as SVG. Screen readers skip the bars, because the pages have the values as text.

// part is a section of a bar. Its state is the CSS class.
type part struct {
	State api.State
	N     int
}

// stackedBar draws the parts of a whole as one bar.
func stackedBar(parts []part) template.HTML {
	total := 0
	for _, p := range parts {
		total += p.N
	}
	var out markup
	out.put(`<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true" focusable="false">`)
	x := 0.0
	for _, p := range parts {
		if p.N == 0 {
			continue
		}
		width := float64(p.N) * 1000 / float64(total)
		out.put(`<rect height="10" class="`, string(p.State), `" x="`, number(x), `" width="`, number(width), `"/>`)
		x += width
	}
	out.put(`</svg>`)
	return out.safe()
}

func number(x float64) string { return strconv.FormatFloat(x, 'f', 1, 64) }

// bar draws a bar for a value. The greatest value has the full width.
func bar(value, greatest float64, state api.State) template.HTML {
	if greatest <= 0 {
		greatest = 1
	}
	var out markup
	out.put(`<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true" focusable="false">`)
	out.put(
		`<rect height="10" x="0" class="`,
		string(state),
		`" width="`,
		number(max(4, value*1000/greatest)),
		`"/></svg>`,
	)
	return out.safe()
}

// The sizes of the chart of releases are in units of its viewBox.
const (
	chartWidth, chartHeight = 720, 160
	chartLeft, chartBottom  = 8, 24
)

// column is a release in the chart. P50 and Max are the median and the maximum of how long its cells took to become
// ready, in seconds.
type column struct {
	Name     string
	P50, Max float64
}

// freshness draws how long the cells of each release took to become ready, oldest release first. Each release has a
// column for its slowest cell, and in front of it a column for the median.
func freshness(all []column) template.HTML {
	greatest := 0.0
	for _, c := range all {
		greatest = max(greatest, c.Max)
	}
	if greatest == 0 {
		return ""
	}
	var out markup
	out.put(
		fmt.Sprintf(
			`<svg class="chart" viewBox="0 0 %d %d" role="img" aria-labelledby="freshness">`,
			chartWidth,
			chartHeight,
		),
	)
	out.put(
		`<title id="freshness">Time until the cells of each release were ready; the list below has the figures</title>`,
	)
	step := float64(chartWidth-2*chartLeft) / float64(len(all))
	room := float64(chartHeight - chartBottom - 16)
	for i, c := range all {
		x := chartLeft + float64(i)*step
		for _, one := range []struct {
			class string
			value float64
		}{{"slowest", c.Max}, {"median", c.P50}} {
			height := one.value * room / greatest
			out.put(`<rect class="`, one.class, `" x="`, number(x+step*.15), `" width="`, number(step*.7), `" y="`,
				number(16+room-height), `" height="`, number(height), `"/>`)
		}
	}
	y := strconv.Itoa(chartHeight - chartBottom)
	out.put(`<line x1="8" x2="`, strconv.Itoa(chartWidth-chartLeft), `" y1="`, y, `" y2="`, y, `"/>`)
	out.put(
		`<text x="8" y="12">`,
		formatSeconds(greatest),
		`</text><text x="8" y="`,
		strconv.Itoa(chartHeight-6),
		`">`,
		all[0].Name,
		`</text><text x="`,
		strconv.Itoa(chartWidth-chartLeft),
		`" y="`,
		strconv.Itoa(chartHeight-6),
		`" text-anchor="end">`,
		all[len(all)-1].Name,
		`</text></svg>`,
	)
	return out.safe()
}
