package browser

// row is one page of the server, in some of the data sets.
type row struct {
	// Name is the subtest's and the screenshots'.
	Name string
	// Path may have {names}, which a data set gives values to. A set that lacks one of
	// them has no such page.
	Path string
	// Sets are those in which the page is looked at; empty is all three.
	Sets []string
	// Status is the one expected; 0 means 200.
	Status int
	// Kind is "page" (the empty one too), "feed" or "badge".
	Kind string
	// Sticky is the table head that stays on the screen while its table is scrolled.
	Sticky string
	// SharesTitle says that the page is another one with a filter, and has its title.
	SharesTitle bool
	// Draw is that make screenshots draws the page.
	Draw bool

	// Missing is set as long as the server has no such page: all that is expected is that
	// it answers 404. When it answers anything else, the test fails until Missing is gone.
	Missing bool
	// Waits names checks that the page does not pass yet, and why. When it passes one of
	// them in all of its sets, the test fails until the entry is gone.
	Waits map[string]string
}

// pages are the pages of the server. The checks are: status, console (no error), csp (no
// violation of the page's policy), hosts (nothing from elsewhere), width (the document
// does not scroll sideways), targets (44 × 44 px on a phone), keyboard, sticky, noscript,
// axe, weight, title.
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
