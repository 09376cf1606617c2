package main

import (
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
)

func publicFlag() ucli.Flag {
	return cli.Bool("public", "the registry is public: refuse files under NVIDIA's licence")
}

func redistributeFlag() ucli.Flag {
	return cli.Choice("redistribute", bundle.RedistributeNone,
		"`PART` of NVIDIA's files that a public registry takes: none, userspace or all",
		bundle.RedistributeNone, bundle.RedistributeUserspace, bundle.RedistributeAll)
}
