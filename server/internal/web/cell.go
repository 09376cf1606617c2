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
	// Both is the path of the page with both flavours. It is "" on the page with both flavours itself.
	Both     string
	Flavours []flavourCell
}

// flavourCell is a cell in the form that its page shows.
type flavourCell struct {
	catalogue.FlavourView
	// Path is the path of the cell's own page.
	Path     string
	Commands []command
	// Signed describes in plain words what is attached to the artifact.
	Signed  []string
	History []try
}

// command is a command that the reader can paste.
type command struct{ What, Text string }

// try is a build in a cell's history.
type try struct {
	api.Build
	Took string // "" while it runs
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
		c := flavourCell{FlavourView: f, Path: cellPath(v.Kernel.Kernel, version, f.Driver.Flavour), History: tries(f.Builds)}
		c.Commands = p.ask(r, f)
		if a := f.Artifact; a != nil && a.State == api.Published {
			if c.Signed, err = p.signed(r.Context(), a, v.Kernel.Kernel); err != nil {
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

// bare matches a word that a shell takes without quotes.
var bare = regexp.MustCompile(`^[A-Za-z0-9._:/@=+,-]+$`)

// quoted quotes a word for a shell. The server's name in a command needs that: it comes from the reader's request,
// and so from anybody who gave the reader a link.
func quoted(word string) string {
	if bare.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// ask returns the commands for a cell. They install, verify and download the artifact of the cell. If there is no
// artifact, the commands request one, or show the state of its build.
func (p *pages) ask(r *http.Request, f catalogue.FlavourView) []command {
	server, k, d := quoted(base(r)), f.Kernel, f.Driver
	cell := fmt.Sprintf("--build-id %s --board %s --driver %s --flavour %s", k.BuildID, k.Board, d.Version, d.Flavour)
	if a := f.Artifact; a != nil && a.State == api.Published {
		ref, crane, cosign := quoted(reference(r.Host, a.Repository, a.Digest)), "", ""
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
		return []command{{"Ask for its state", "server resolve --server " + server + " " + cell}}
	case api.Unsupported, api.Yanked, api.Quarantined:
		return nil
	}
	return []command{
		{
			"Ask for it, with a token that may ask",
			"server request --server " + server + " --token-file prebake.token " + cell,
		},
	}
}

// maxReferrers is how many statements of an artifact are examined. An artifact may have statements for each of hundreds
// of kernels.
const maxReferrers = 200

// signed describes what is attached to an artifact on this server. It reads labels, which anybody who may push can
// write. A node verifies the statements themselves.
func (p *pages) signed(ctx context.Context, a *api.Artifact, k target.Kernel) ([]string, error) {
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

// tries makes the history of a cell from its builds.
func tries(builds []api.Build) []try {
	var all []try
	seconds := make([]float64, len(builds))
	greatest := 0.0
	for i, b := range builds {
		if b.StartedAt != nil && b.FinishedAt != nil {
			seconds[i] = b.FinishedAt.Sub(*b.StartedAt).Seconds()
		}
		greatest = max(greatest, seconds[i])
	}
	for i, b := range builds {
		t := try{Build: b}
		if seconds[i] > 0 {
			t.Took, t.Bar = took(seconds[i]), bar(seconds[i], greatest, b.State)
		}
		all = append(all, t)
	}
	return all
}

type buildPage struct {
	head
	api.Build
	// Cell is the path of the cell's page. Ref is the reference that OCI clients pull.
	Cell, Ref, Total string
	Phases           []phase
	HasLog, Open     bool
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
	page.Total = took(timeline.Total(b.Phases))
	greatest := 0.0
	for _, one := range b.Phases {
		greatest = max(greatest, one.Seconds)
	}
	for _, one := range b.Phases {
		state := api.Published
		if one.Failed {
			state = api.Failed
		}
		page.Phases = append(page.Phases, phase{one, took(one.Seconds), bar(one.Seconds, greatest, state)})
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

// maxLogEnd is the most bytes of a log that a page shows.
const maxLogEnd = 8 << 10

// logEnd reads the last complete lines of a build's log. there is false if the build has no log.
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
