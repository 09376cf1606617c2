package main

import (
	"context"
	"io"
	"maps"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// gpu has the drivers that a COS build's driver lists have for one type of GPU.
type gpu struct {
	// Kernel is written as BUILD_ID/board.
	Kernel string `json:"kernel"`
	GPU    string `json:"gpu"`
	api.GPUDrivers
}

func gpusCommand() *ucli.Command {
	own := &ucli.StringFlag{Name: "gpu", Usage: "show only this `TYPE` of GPU; write COS's name for it, such as NVIDIA_L4"}
	cmd := list("gpus", "list the drivers that COS builds name for each type of GPU, newest build first",
		clientFlags(append(kernelFilters(), milestoneFilter(), gkeFilter(), own)...),
		func(ctx context.Context, c *api.Client, cmd *ucli.Command) ([]gpu, error) {
			f := filter(cmd)
			if f.BuildID == "" && f.Milestone == 0 && f.GKE == "" && cmd.String("gpu") == "" {
				return nil, fault.New(fault.Usage, "list the drivers for types of GPU: no flag says for which COS builds",
					"add at least one of the flags --build-id, --milestone, --gke and --gpu")
			}
			all := []gpu{}
			for k, err := range c.EachKernel(ctx, f) {
				if err != nil {
					return nil, err
				}
				for _, name := range slices.Sorted(maps.Keys(k.GPUs)) {
					if want := cmd.String("gpu"); want == "" || want == name {
						all = append(all, gpu{k.String(), name, k.GPUs[name]})
					}
				}
			}
			return all, nil
		}, printGPUs)
	cmd.Description = `Example:
  server gpus --gke 1.33 --gpu NVIDIA_L4`
	return cmd
}

func printGPUs(w io.Writer, all []gpu) error {
	var rows [][]string
	for _, g := range all {
		var branches []string
		for _, b := range slices.Sorted(maps.Keys(g.Branches)) {
			branches = append(branches, b+" "+g.Branches[b])
		}
		rows = append(rows, []string{g.Kernel, g.GPU, orDash(g.Default), orDash(g.Latest), strings.Join(branches, ", ")})
	}
	return printTable(w, []string{"KERNEL", "GPU", "DEFAULT", "LATEST", "BRANCHES"}, rows,
		"no such COS build has a driver list for a GPU; list COS builds: server kernels")
}
