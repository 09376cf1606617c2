package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/prebake/prebake/builder/internal/batch"
	"github.com/prebake/prebake/builder/internal/compile"
	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/cosbucket"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/plan"
	"github.com/prebake/prebake/pkg/sandbox"
)

// failureStore returns the store of permanent failures in the cache. Single builds and wish lists share this store.
func failureStore(ctx context.Context, cfg pipeline.Config, kernels, drivers *cosbucket.Bucket) (*batch.FailureStore,
	error) {
	host, err := sandbox.HostTools()
	if err != nil {
		return nil, err
	}
	types := ""
	if cfg.BTF { // a build that fails with this pahole may succeed with another one
		if types, err = compile.Pahole(ctx); err != nil {
			types = "none" // the build reports that pahole is missing
		}
	}
	how, signatures := cfg.Signing()
	return &batch.FailureStore{
		Facts: cfg.Cache, Kernels: kernels, Drivers: drivers, Version: version, BTF: cfg.BTF,
		Settings:   fmt.Sprintf("%s, debug symbols %t, host tools %s, pahole %s", how, cfg.DebugSymbols, host, types),
		Signatures: signatures,
	}, nil
}

// keepFailure records why a single build failed, so that a wish list does not try the cell again. A failure before all
// inputs were fetched is not recorded, because a missing input may be published later.
func keepFailure(ctx context.Context, cfg pipeline.Config, res *pipeline.Result, failed error) (err error) {
	if ctx.Err() != nil || !batch.Permanent(fault.Of(failed), res) || res == nil || len(res.Phases) < 2 {
		return nil
	}
	kernels, err := cosbucket.Open(ctx, cfg.KernelMirror)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, kernels.Close()) }()
	drivers, err := cosbucket.Open(ctx, cfg.DriverMirror)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, drivers.Close()) }()
	memory, err := failureStore(ctx, cfg, kernels, drivers)
	if err != nil {
		return err
	}
	return memory.Remember(ctx, plan.Cell{Kernel: res.Kernel, Driver: res.Driver}, batch.FailureOf(failed))
}
