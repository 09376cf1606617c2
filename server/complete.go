package main

import (
	"context"
	"fmt"
	"iter"
	"strconv"
	"strings"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/auth"
)

// maxCandidates is the maximum number of entries that completion reads from a list. They are the newest.
const maxCandidates = 200

// complete returns the possible values of a flag or an argument. If the server does not respond, it returns only fixed
// words.
func complete(ctx context.Context, at cli.Place) []cli.Candidate {
	switch at.Flag {
	case "flavour":
		if at.Command == "artifacts" || at.Command == "builds" || at.Command == "retry" {
			return fixed("proprietary", "open")
		}
		return fixed("auto", "proprietary", "open")
	case "state":
		switch at.Command {
		case "artifacts":
			return fixed(string(api.Published), string(api.Yanked), string(api.Quarantined))
		case "cells":
			return fixed(
				string(api.Building),
				string(api.Queued),
				string(api.Failed),
				string(api.Yanked),
				string(api.Quarantined),
				string(api.Cancelled),
			)
		}
		return fixed(
			string(api.Queued),
			string(api.Building),
			string(api.Published),
			string(api.Failed),
			string(api.Cancelled),
		)
	case "class":
		var all []string
		for _, k := range fault.Kinds() {
			all = append(all, k.String())
		}
		return fixed(all...)
	case "scope":
		var all []string
		for _, s := range auth.Scopes() {
			all = append(all, string(s))
		}
		return fixed(all...)
	case "board":
		return kernelsOf(ctx, at, func(k api.Kernel) cli.Candidate { return cli.Candidate{Value: k.Board} })
	case "build-id":
		return buildIDs(ctx, at)
	case "driver":
		return driversOf(ctx, at)
	case "digest", "replacement":
		return digests(ctx, at, "")
	case "":
		return arguments(ctx, at)
	}
	return nil
}

// arguments returns the possible values of a command's next argument.
func arguments(ctx context.Context, at cli.Place) []cli.Candidate {
	if at.Command == "preflight" {
		return buildIDs(ctx, at)
	}
	if len(at.Args) > 0 {
		return nil
	}
	switch at.Command {
	case "build":
		return buildsOf(ctx, at, "")
	case "watch", "cancel":
		return append(buildsOf(ctx, at, api.Building), buildsOf(ctx, at, api.Queued)...)
	case "release", "announce":
		return buildIDs(ctx, at)
	case "artifact":
		return digests(ctx, at, "")
	case "yank":
		return digests(ctx, at, api.Published)
	case "unyank":
		return digests(ctx, at, api.Yanked)
	case "lift":
		return digests(ctx, at, api.Quarantined)
	case "wish-lists show", "wish-lists put", "wish-lists remove":
		lists, _ := server(at).WishLists(ctx) // if the server does not respond, no list is offered
		var all []cli.Candidate
		for _, l := range lists {
			all = append(all, cli.Candidate{Value: l.Name, About: fmt.Sprintf("%d cells", l.Cells)})
		}
		return all
	}
	return nil
}

func server(at cli.Place) *api.Client { return api.NewClient(at.Value("server"), "", nil) }

func fixed(all ...string) []cli.Candidate {
	var out []cli.Candidate
	for _, v := range all {
		out = append(out, cli.Candidate{Value: v})
	}
	return out
}

// candidatesOf returns a candidate for each of the first entries of a list, and leaves out repeated values.
func candidatesOf[T any](entries iter.Seq2[T, error], of func(T) cli.Candidate) []cli.Candidate {
	var out []cli.Candidate
	seen, n := map[string]bool{}, 0
	for entry, err := range entries {
		if n++; err != nil || n > maxCandidates {
			break
		}
		if c := of(entry); c.Value != "" && !seen[c.Value] {
			seen[c.Value] = true
			out = append(out, c)
		}
	}
	return out
}

func kernelsOf(ctx context.Context, at cli.Place, of func(api.Kernel) cli.Candidate) []cli.Candidate {
	return candidatesOf(server(at).EachKernel(ctx, api.Filter{Page: maxCandidates}), of)
}

func buildIDs(ctx context.Context, at cli.Place) []cli.Candidate {
	return kernelsOf(ctx, at, func(k api.Kernel) cli.Candidate {
		about := ""
		if k.Milestone > 0 {
			about = "COS milestone " + strconv.Itoa(k.Milestone)
		}
		return cli.Candidate{Value: k.BuildID, About: about}
	})
}

// driversOf returns driver versions. If --driver of the command accepts wishes, it adds default, latest and the
// branches.
func driversOf(ctx context.Context, at cli.Place) []cli.Candidate {
	var words, branches []cli.Candidate
	seen := map[string]bool{}
	wish := at.Command == "resolve" || at.Command == "request" || at.Command == "preflight" || at.Command == "watch"
	versions := candidatesOf(server(at).EachDriver(ctx, api.Filter{Page: maxCandidates}),
		func(d api.DriverRelease) cli.Candidate {
			if wish && d.Branch != "" && !seen[d.Branch] {
				seen[d.Branch] = true
				branches = append(branches, cli.Candidate{Value: d.Branch, About: "branch"})
			}
			return cli.Candidate{Value: d.Version, About: "of branch " + d.Branch}
		})
	if wish {
		words = fixed("default", "latest")
	}
	return append(append(words, branches...), versions...)
}

func buildsOf(ctx context.Context, at cli.Place, state api.State) []cli.Candidate {
	return candidatesOf(server(at).EachBuild(ctx, api.Filter{State: state, Page: maxCandidates}),
		func(b api.Build) cli.Candidate {
			return cli.Candidate{Value: strconv.FormatInt(b.ID, 10),
				About: strings.Join([]string{string(b.State), b.Kernel.String(), b.Driver.String()}, " ")}
		})
}

func digests(ctx context.Context, at cli.Place, state api.State) []cli.Candidate {
	return candidatesOf(
		server(at).EachArtifact(ctx, api.Filter{State: state, Page: maxCandidates}),
		func(a api.Artifact) cli.Candidate {
			return cli.Candidate{Value: a.Digest, About: strings.TrimSpace(a.Driver.String() + " " + string(a.State))}
		},
	)
}
