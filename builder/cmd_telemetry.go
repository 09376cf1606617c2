package main

import (
	"context"
	"log/slog"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/telemetry"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
)

// metricsFlag returns the flag --metrics-address, for commands that run long enough for Prometheus to scrape them.
func metricsFlag() ucli.Flag {
	return cli.String("metrics-address", "", "serve Prometheus metrics at http://`ADDR`/metrics")
}

// startTelemetry serves metrics at --metrics-address, and sends the traces that the OTEL_* environment variables
// configure.
func startTelemetry(ctx context.Context, cmd *ucli.Command, cache *cas.Cache, log *slog.Logger) (*telemetry.Telemetry,
	error) {
	return telemetry.Start(ctx,
		telemetry.Config{Version: version, MetricsAddress: cmd.String("metrics-address"), Cache: cache, Log: log})
}
