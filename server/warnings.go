package main

import (
	"context"
	"io"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
)

func warningsCommand() *ucli.Command {
	return list("warnings", "list failures that early-warning entries of wish lists found", clientFlags(),
		func(ctx context.Context, c *api.Client, _ *ucli.Command) ([]api.Warning, error) {
			return c.Warnings(ctx)
		}, printWarnings)
}

func printWarnings(w io.Writer, all []api.Warning) error {
	var rows [][]string
	for _, v := range all {
		rows = append(rows, []string{
			v.Kernel.String(), v.Driver.String(), v.Since.UTC().Format(time.DateOnly), v.Class + ": " + v.Error,
		})
	}
	return printTable(w, []string{"KERNEL", "DRIVER", "SINCE", "WHY"}, rows, "no early warning")
}
