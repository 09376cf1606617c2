package registry

import (
	"bufio"
	"bytes"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// webPageTransport recognises a web page in place of a registry's response: the login page of a network, or the page of
// a proxy. A response counts as a web page only if its type is HTML and it begins like HTML, because some registries
// use this type for other content.
type webPageTransport struct{ next http.RoundTripper }

func (p webPageTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := p.next.RoundTrip(req)
	// Registries without the referrers API may answer with a page, which lenientTransport handles. Quay answers /v2/ with
	// the type of a page.
	if err != nil || req.Method != http.MethodGet || resp.StatusCode != http.StatusOK || req.URL.Path == "/v2/" ||
		strings.Contains(req.URL.Path, "/referrers/") {
		return resp, err
	}
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "text/html" {
		return resp, nil
	}
	body := bufio.NewReaderSize(resp.Body, 512)
	start, _ := body.Peek(512) // the error comes again when the body is read
	if !bytes.HasPrefix(bytes.TrimSpace(bytes.TrimPrefix(start, []byte("\ufeff"))), []byte("<")) {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{body, resp.Body}
		return resp, nil
	}
	_ = resp.Body.Close() // the page is not needed
	return nil, fault.New(fault.WebPage, req.URL.Host+" answered with a web page",
		"open "+req.URL.Scheme+"://"+req.URL.Host+" in a browser on this network: if it is a login page, log in; if a "+
			"proxy answers, add the host to NO_PROXY; else correct the address of the repository")
}
