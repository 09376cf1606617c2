package browser

// row is one page of the server, and the data sets in which it is checked.
type row struct {
	// Name is the name of the subtest and of the screenshots.
	Name string
	// Path may contain {names}, which each data set replaces. A data set that lacks one of these names does not have the
	// page.
	Path string
	// Sets are the data sets in which the page is checked; empty means all three.
	Sets []string
	// Status is the expected HTTP status; 0 means 200.
	Status int
	// Kind is "page", "feed" or "badge"; "" means "page".
	Kind string
	// Sticky is the selector of the table head that must stay on the screen while the table is scrolled.
	Sticky string
	// SharesTitle is true if the page is another page with a filter, and has its title.
	SharesTitle bool
	// Draw is true if `make screenshots` draws the page.
	Draw bool

	// Missing says that the server does not have the page yet. The page must then answer 404.
	Missing bool
	// Waits has the checks that the page does not pass yet, with the reasons. A check that passes in all data sets must be
	// removed from Waits.
	Waits map[string]string
}

// pages are the pages of the server. The checks are:
//   - status
//   - console: no error
//   - csp: no violation of the page's content security policy
//   - hosts: no resource from another host
//   - width: the document does not scroll sideways
//   - targets: at least 44 × 44 px on a phone
//   - keyboard, sticky, noscript, axe, weight, title
var pages = []row{
	{Name: "matrix", Path: "/", Sticky: "table.matrix thead th", Draw: true},
	{Name: "filtered", Path: "/?board={board}&milestone={milestone}", SharesTitle: true},
	{Name: "searched", Path: "/?driver={version}&state=failed&q={branch}", SharesTitle: true},
	{Name: "cell", Path: "/cells/{board}/{build}/{version}/{flavour}", Draw: true},
	{Name: "cell-unknown", Path: "/cells/{unknown}", Draw: true},
	{Name: "cell-yanked", Path: "/cells/{yanked}", Draw: true},
	{Name: "cell-quarantined", Path: "/cells/{quarantined}", Draw: true},
	{Name: "building", Path: "/builds/{building}", Draw: true},
	{Name: "failed", Path: "/builds/{failed}", Draw: true},
	{Name: "published", Path: "/builds/{published}", Draw: true},
	{Name: "queued", Path: "/builds/{queued}"},
	{Name: "queue", Path: "/queue", Draw: true},
	{Name: "releases", Path: "/releases", Draw: true},
	{Name: "preflight", Path: "/preflight", Draw: true},
	{Name: "preflight-answer", Path: "/preflight?board={board}&build={build}&driver={version}", Draw: true,
		SharesTitle: true},
	{Name: "warnings", Path: "/warnings", Draw: true},
	{Name: "404", Path: "/nowhere", Status: 404, Draw: true},
	{Name: "feed", Path: "/feed.atom", Kind: "feed"},
	{Name: "badge", Path: "/badge.svg", Kind: "badge"},
}
