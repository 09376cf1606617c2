package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
)

func liftCommand() *ucli.Command {
	return answerCommand(
		"lift",
		"take an artifact out of quarantine: nodes get it again",
		"DIGEST",
		"take the digest from the list of quarantined artifacts: server quarantine",
		writeFlags(),
		func(ctx context.Context, c *api.Client, digest string) (api.Artifact, error) {
			return c.Lift(ctx, digest)
		},
		func(w io.Writer, a api.Artifact) error { return printArtifacts(w, []api.Artifact{a}) },
	)
}

func printQuarantine(w io.Writer, all []api.Quarantine) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "nothing is in quarantine")
		return err
	}
	for _, q := range all {
		fields := [][2]string{
			{"digest", q.Artifact.Digest},
			{"driver", q.Artifact.Driver.String()},
			{"reason", q.Artifact.Reason},
		}
		for _, n := range q.Reports {
			fields = append(fields, [2]string{n.BuildID, fmt.Sprintf("%s: %d loaded, %d failed, %d fell back",
				n.Board, n.Loaded, n.Failed, n.FellBack)})
		}
		fields = append(fields, [2]string{"hint",
			"to allow it again: server lift DIGEST; to withdraw it: server yank DIGEST --reason WHY"})
		if err := printFields(w, fields); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	return nil
}

func printReports(w io.Writer, all []api.ReportCounts) error {
	rows := [][]string{}
	for _, n := range all {
		rows = append(
			rows,
			[]string{n.BuildID, n.Board, strconv.Itoa(n.Loaded), strconv.Itoa(n.Failed), strconv.Itoa(n.FellBack), n.Digest},
		)
	}
	return printTable(w, []string{"BUILD_ID", "BOARD", "LOADED", "FAILED", "FELL BACK", "DIGEST"}, rows,
		"no node reported within thirty days; start nodes with \"fetcher run --report\"")
}
