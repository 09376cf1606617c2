package main

import (
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
)

func publicFlag() ucli.Flag {
	return cli.Bool("public", "treat the registry as public: refuse NVIDIA's files that --redistribute does not allow")
}

func redistributeFlag() ucli.Flag {
	return cli.Choice("redistribute", bundle.RedistributeNone,
		"with --public: `PART` of NVIDIA's files that the registry accepts: none, userspace or all",
		bundle.RedistributeNone, bundle.RedistributeUserspace, bundle.RedistributeAll)
}
