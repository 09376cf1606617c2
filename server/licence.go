package main

import (
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
)

func publicFlag() ucli.Flag {
	return cli.Bool("public", "everybody may read the registry: take nothing that is under NVIDIA's licence")
}

func redistributeFlag() ucli.Flag {
	return cli.Choice("redistribute", bundle.RedistributeNone,
		"what of NVIDIA's a public registry takes: `PART` is none, userspace or all",
		bundle.RedistributeNone, bundle.RedistributeUserspace, bundle.RedistributeAll)
}
