package web

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/http"
	"regexp"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/target"
	"github.com/prebake/prebake/pkg/timeline"
	"github.com/prebake/prebake/pkg/trust"
	"github.com/prebake/prebake/server/internal/catalogue"
)

type cellPage struct {
	head
	Kernel  api.Kernel
	Release api.DriverRelease
	// GPUs are the types of GPU for which the COS build lists this driver.
	GPUs []catalogue.GPULabel
	// Both is the path of the page with both flavours; "" on that page itself.
	Both     string
	Flavours []flavourCell
}

// flavourCell is what the page shows about a cell.
type flavourCell struct {
	catalogue.FlavourView
	// Path is the path of the cell's own page.
	Path     string
	Commands []command
	// Signed has a sentence about each statement that is attached to the artifact.
	Signed  []string
	History []historyEntry
}

// command is a command that the reader can copy, with the text above it.
type command struct{ What, Text string }

// historyEntry is a build in a cell's history.
type historyEntry struct {
	api.Build
	Took string // "" while the build is open
	Bar  template.HTML
}

func (p *pages) cell(w http.ResponseWriter, r *http.Request) {
	version, flavour := r.PathValue("driver"), target.Flavour(r.PathValue("flavour"))
	v, err := p.Catalogue.View(r.Context(), r.PathValue("build"), r.PathValue("board"), version)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := cellPage{Kernel: v.Kernel, Release: v.Release, GPUs: catalogue.GPULabels(v.Kernel, version)}
	page.Title = v.Kernel.BuildID + " with driver " + version
	if flavour != "" {
		page.Title += " " + string(flavour)
		page.Both = cellPath(v.Kernel.Kernel, version, "")
	}
	for _, f := range v.Flavours {
		if flavour != "" && f.Driver.Flavour != flavour {
			continue
		}
		if f.State == api.Building || f.State == api.Queued {
			page.Refresh = true
			page.Live = fmt.Sprintf("/v1/builds/%d/events", f.Build.ID)
		}
		c := flavourCell{FlavourView: f, History: historyOf(f.Builds)}
		c.Path = cellPath(v.Kernel.Kernel, version, f.Driver.Flavour)
		c.Commands = p.commandsFor(r, f)
		if a := f.Artifact; a != nil && a.State == api.Published {
			if c.Signed, err = p.describeAttachments(r.Context(), a, v.Kernel.Kernel); err != nil {
				p.fail(w, r, err)
				return
			}
		}
		page.Flavours = append(page.Flavours, c)
	}
	if len(page.Flavours) == 0 {
		p.fail(
			w,
			r,
			fault.New(fault.NotFound, fmt.Sprintf("flavour %.20q does not exist", string(flavour)), "use proprietary or open"),
		)
		return
	}
	p.render(w, r, http.StatusOK, "cell.html", page)
}

// shellSafe matches a word that needs no quotes in a shell.
var shellSafe = regexp.MustCompile(`^[A-Za-z0-9._:/@=+,-]+$`)

// shellQuote quotes a word for a shell. The server's name comes from the request, and a link with a hostile name may
// have caused the request.
func shellQuote(word string) string {
	if shellSafe.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// commandsFor returns the commands for a cell: to use a published artifact, to watch an open build, or to request a
// build.
func (p *pages) commandsFor(r *http.Request, f catalogue.FlavourView) []command {
	server, k, d := shellQuote(base(r)), f.Kernel, f.Driver
	cell := fmt.Sprintf("--build-id %s --board %s --driver %s --flavour %s", k.BuildID, k.Board, d.Version, d.Flavour)
	if a := f.Artifact; a != nil && a.State == api.Published {
		ref, crane, cosign := shellQuote(reference(r.Host, a.Repository, a.Digest)), "", ""
		if strings.HasPrefix(a.Repository, "/") && plain(r) {
			crane, cosign = " --insecure", " --allow-http-registry"
		}
		return []command{
			{
				"Install it on a node of this COS build",
				fmt.Sprintf("fetcher install --server %s --driver %s --flavour %s", server, d.Version, d.Flavour),
			},
			{"Print the result of each trust rule for it, with the public key in prebake.key.pub",
				"fetcher verify --public-key prebake.key.pub --build-id " + k.BuildID + " --board " + k.Board + " " + ref},
			{"Download it", "crane pull" + crane + " " + ref + " driver.tar"},
			{"Verify who built it, and from what", "cosign verify-attestation" + cosign +
				" --key prebake.key.pub --insecure-ignore-tlog --type slsaprovenance1 " + ref},
		}
	}
	switch f.State {
	case api.Building, api.Queued:
		return []command{{"Show the state of its build", "server resolve --server " + server + " " + cell}}
	case api.Unsupported, api.Yanked, api.Quarantined:
		return nil
	}
	return []command{
		{
			"Request a build, with a token that has the scope ask",
			"server request --server " + server + " --token-file prebake.token " + cell,
		},
	}
}

// maxReferrers is the maximum number of statements about an artifact that are read. An artifact has some for each
// kernel.
const maxReferrers = 200

// describeAttachments describes the statements about an artifact on this server by their labels. The labels are
// not verified here. Nodes verify the statements themselves.
func (p *pages) describeAttachments(ctx context.Context, a *api.Artifact, k target.Kernel) ([]string, error) {
	repository, local := strings.CutPrefix(a.Repository, "/")
	if !local || p.Registry == nil {
		return nil, nil
	}
	var out []string
	say := func(text string) { out = append(out, text) }
	attached, err := p.Registry.Labels(ctx, repository, a.Digest, maxReferrers)
	if err != nil {
		return nil, err
	}
	others := 0
	for _, labels := range attached {
		of, verdict := labels[trust.LabelKernel], labels[trust.LabelVerdict]
		switch labels[trust.LabelPredicate] {
		case trust.PredicateProvenance:
			say("Who built it, from which sources and with which options (SLSA provenance).")
		case trust.PredicateSBOM:
			say("What is in it (SPDX).")
		case trust.PredicateReproduced:
			say("A second builder made the same bytes from the same sources.")
		case trust.PredicateKernelMatch:
			if of == k.String() {
				say("It fits the kernel of this COS build: same fingerprint.")
			} else {
				others++
			}
		case trust.PredicateTestResult:
			if verdict == "" {
				verdict = "tried"
			}
			if of == k.String() {
				say("Its modules were " + verdict + " in a virtual machine that ran this kernel.")
			} else {
				say("Its modules were " + verdict + " in a virtual machine that ran the kernel of " + of + ".")
			}
		}
	}
	if others > 0 {
		say(fmt.Sprintf("It fits the kernels of %d other COS builds.", others))
	}
	return out, nil
}

// historyOf returns the history of a cell with these builds.
func historyOf(builds []api.Build) []historyEntry {
	var all []historyEntry
	seconds := make([]float64, len(builds))
	greatest := 0.0
	for i, b := range builds {
		if b.StartedAt != nil && b.FinishedAt != nil {
			seconds[i] = b.FinishedAt.Sub(*b.StartedAt).Seconds()
		}
		greatest = max(greatest, seconds[i])
	}
	for i, b := range builds {
		t := historyEntry{Build: b}
		if seconds[i] > 0 {
			t.Took, t.Bar = formatSeconds(seconds[i]), bar(seconds[i], greatest, b.State)
		}
		all = append(all, t)
	}
	return all
}

type buildPage struct {
	head
	api.Build
	// Cell is the path of the cell's page. Ref is the artifact's reference for OCI clients.
	Cell, Ref, Total string
	Phases           []phase
	HasLog, Open     bool
	// WhyNoLog says why an ended build has no log. It is "" if there is one, or if the server has removed it.
	WhyNoLog string
	// LogEnd is the last part of a running build's log.
	LogEnd string
}

// phase is a phase of a build with its duration.
type phase struct {
	timeline.Phase
	Took string
	Bar  template.HTML
}

func (p *pages) build(w http.ResponseWriter, r *http.Request) {
	id, err := parseID(r.PathValue("id"))
	if err != nil {
		p.fail(w, r, err)
		return
	}
	b, err := p.Catalogue.Build(r.Context(), id)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	page := buildPage{Build: b,
		Open: b.State == api.Queued || b.State == api.Building, Cell: cellPath(b.Kernel, b.Driver.Version, b.Driver.Flavour)}
	page.Title = fmt.Sprintf("Build %d", id)
	if page.Open {
		page.Refresh = true
		page.Live = fmt.Sprintf("/v1/builds/%d/events", id)
	}
	if page.LogEnd, page.HasLog, err = p.logEnd(r.Context(), id); err != nil {
		p.fail(w, r, err)
		return
	}
	if !page.Open && !page.HasLog && b.LogRemovedAt == nil {
		page.WhyNoLog = catalogue.WhyNoLog(b)
	}
	page.Total = formatSeconds(timeline.Total(b.Phases))
	greatest := 0.0
	for _, one := range b.Phases {
		greatest = max(greatest, one.Seconds)
	}
	for _, one := range b.Phases {
		state := api.Published
		if one.Failed {
			state = api.Failed
		}
		page.Phases = append(page.Phases, phase{one, formatSeconds(one.Seconds), bar(one.Seconds, greatest, state)})
	}
	if b.Digest != "" {
		a, err := p.Catalogue.Artifact(r.Context(), b.Digest)
		if err != nil && !fault.Is(err, fault.NotFound) {
			p.fail(w, r, err)
			return
		}
		if err == nil {
			page.Ref = reference(r.Host, a.Repository, a.Digest)
		}
	}
	p.render(w, r, http.StatusOK, "build.html", page)
}

// maxLogEnd is the maximum size of a log on a page, in bytes.
const maxLogEnd = 8 << 10

// logEnd returns the last complete lines of a build's log, and reports whether there is a log.
func (p *pages) logEnd(ctx context.Context, id int64) (text string, there bool, err error) {
	log, size, err := p.Catalogue.OpenLog(ctx, id)
	if fault.Is(err, fault.NotFound) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	if _, err := log.Seek(max(0, size-maxLogEnd), io.SeekStart); err != nil {
		return "", false, err
	}
	raw, err := io.ReadAll(io.LimitReader(log, maxLogEnd))
	if size > maxLogEnd {
		_, raw, _ = bytes.Cut(raw, []byte("\n"))
	}
	return strings.ToValidUTF8(string(raw), "?"), true, err
}
