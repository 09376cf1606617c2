package web

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"net/http"
	"time"

	"github.com/prebake/prebake/pkg/api"
)

// The types in this file are an Atom feed (RFC 4287).

type atomFeed struct {
	XMLName xml.Name    `xml:"http://www.w3.org/2005/Atom feed"`
	ID      string      `xml:"id"`
	Title   string      `xml:"title"`
	Updated string      `xml:"updated"`
	Author  atomAuthor  `xml:"author"`
	Links   []atomLink  `xml:"link"`
	Entries []atomEntry `xml:"entry"`
}

type atomAuthor struct {
	Name string `xml:"name"`
}

type atomLink struct {
	Rel  string `xml:"rel,attr,omitempty"`
	Type string `xml:"type,attr,omitempty"`
	Href string `xml:"href,attr"`
}

type atomEntry struct {
	ID       string       `xml:"id"`
	Title    string       `xml:"title"`
	Updated  string       `xml:"updated"`
	Link     atomLink     `xml:"link"`
	Category atomCategory `xml:"category"`
	Summary  string       `xml:"summary"`
}

type atomCategory struct {
	Term string `xml:"term,attr"`
}

// maxEntries is the maximum number of entries of the feed.
const maxEntries = 30

func (p *pages) feed(w http.ResponseWriter, r *http.Request) {
	news, err := p.Catalogue.Newest(r.Context(), maxEntries)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	at := base(r)
	feed := atomFeed{
		ID:     at + "/feed.atom",
		Title:  "Prebake: drivers published, failed and withdrawn",
		Author: atomAuthor{"Prebake"},
		Updated: date(
			time.Unix(0, 0),
		),
		Links: []atomLink{{"self", "application/atom+xml", at + "/feed.atom"}, {"alternate", "text/html", at + "/"}},
	}
	for i, n := range news {
		if i == 0 {
			feed.Updated = date(n.At)
		}
		feed.Entries = append(feed.Entries, entry(at, n.At, n.Build, n.Artifact))
	}
	var out bytes.Buffer
	out.WriteString(xml.Header)
	coder := xml.NewEncoder(&out)
	coder.Indent("", " ")
	if err := coder.Encode(feed); err != nil {
		p.fail(w, r, fmt.Errorf("write feed: %w", err))
		return
	}
	w.Header().Set("Content-Type", "application/atom+xml; charset=utf-8")
	w.Header().Set("Cache-Control", "private, max-age=60") // the feed has the host name that the reader used
	_, _ = out.WriteTo(w)                                  // an error means that the client is gone
}

// entry returns the entry for a build that ended, or for an artifact that was withdrawn.
func entry(server string, at time.Time, b *api.Build, a *api.Artifact) atomEntry {
	e := atomEntry{Updated: date(at)}
	if b != nil {
		e.Link.Href = fmt.Sprintf("%s/builds/%d", server, b.ID)
		e.ID = e.Link.Href + "#" + string(b.State)
		e.Category.Term = string(b.State)
		e.Title = fmt.Sprintf("%s: driver %s for COS build %s", label(b.State), b.Driver, b.Kernel)
		e.Summary = b.Digest
		if b.State == api.Failed {
			e.Summary = b.Class + ": " + b.Error
		}
		return e
	}
	e.Link.Href = server + "/v1/artifacts/" + a.Digest
	e.ID = e.Link.Href + "#" + string(a.State) + date(at)
	e.Category.Term = string(a.State)
	e.Title = fmt.Sprintf("%s: driver %s (%s)", label(a.State), a.Driver, short(a.Digest))
	e.Summary = a.Reason
	if a.Replacement != "" {
		e.Summary += "; use " + a.Replacement
	}
	return e
}
