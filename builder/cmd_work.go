package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/builder/internal/worker"
	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/pkg/registry"
	"github.com/prebake/prebake/pkg/timeline"
)

func workCommand() *ucli.Command {
	// If the host has no name, the default of --id is builder.
	host, _ := os.Hostname()
	if host == "" {
		host = "builder"
	}
	id := cli.String("id", host, "unique `NAME` of this builder")
	id.DefaultText = "the host's name"
	grace := cli.Duration("grace", 0, "`TIME` to wait for active builds after a stop signal")
	grace.DefaultText = "10m with --wish, 0 with --queue"
	return cli.WithConfig(&ucli.Command{
		Name:  "work",
		Usage: "take builds from the queue, or build what a wish list asks for",
		Description: `Example:
  builder work --queue URL --config work.yaml`,
		Flags: slices.Concat(
			cli.Group(groupWhat,
				wishFlag(),
				cli.Duration("interval", 15*time.Minute, "with --wish: `TIME` between checks of the list"),
				cli.String("queue", "", "`URL` of the queue: sqlite:///PATH or postgres://…"),
				cli.String("server", "http://127.0.0.1:8440", "`URL` of the server"),
				cli.String("token", "", "`TOKEN` for the server, with scopes build and push"),
				cli.String("token-file", "", "`FILE` with the token; builder reads it for each request"),
				id,
			),
			pipelineFlags(),
			wishFlags(),
			cli.Group(groupResources,
				cli.Range("concurrency", 1, 1, 1000, "with --queue: run `COUNT` builds at once"),
				homeDefault(cli.WasCalled(cli.String("state-dir", filepath.Join(filepath.Dir(defaultCache()), "worker"),
					"`FOLDER` for a lock file and the logs of running builds"), "state")),
				grace,
			),
			cli.Group(groupOutput, metricsFlag()),
			cli.Group(groupOutput, cli.LogFlags()...),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			if cmd.String("wish") != "" {
				return runWorkWish(ctx, cmd)
			}
			return runWork(ctx, cmd)
		},
	}, cli.Config{Secrets: secretFlags(), Check: checkWork})
}

// secretFlags returns the flags that a configuration file must not contain. The value for each flag is the setting to
// use instead.
func secretFlags() map[string]string {
	return map[string]string{
		"token":    "token-file, or the variable PREBAKE_TOKEN",
		"password": "what docker login stores, or the variable PREBAKE_PASSWORD",
	}
}

// checkWork returns an error for each setting of the command work that is missing, wrong, or excluded by another one.
func checkWork(cmd *ucli.Command) error {
	_, err := serverURL(cmd)
	return errors.Join(oneOf(cmd, "wish", "queue"), requireFlags(cmd, "to", "key"), oneSignature(cmd), checkKey(cmd), err,
		checkMaxAge(cmd))
}

// checkMaxAge returns an error if --max-age is given together with --queue. The server queues no published cell, so the
// builder would see almost no old artifact.
func checkMaxAge(cmd *ucli.Command) error {
	if cmd.String("queue") == "" || cmd.Int("max-age") == 0 {
		return nil
	}
	return cli.About(fault.New(fault.Usage,
		"--max-age has almost no effect with --queue, because the server does not queue published cells",
		fmt.Sprintf("leave out --max-age; to rebuild old artifacts, start this command from a timer: builder build --wish "+
			"FILE --max-age %d", cmd.Int("max-age"))),
		"max-age")
}

// serverURL returns the URL of the server from which the command work takes builds.
func serverURL(cmd *ucli.Command) (*url.URL, error) {
	u, err := url.Parse(cmd.String("server"))
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, cli.About(fault.New(fault.Usage, fmt.Sprintf("server %q: want a URL", cmd.String("server")),
			"give a URL, such as --server http://127.0.0.1:8440"), "server")
	}
	return u, nil
}

func runWork(ctx context.Context, cmd *ucli.Command) (err error) {
	log, err := cli.Logger(cmd)
	if err != nil {
		return err
	}
	cfg, err := pipelineConfig(cmd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cfg.Cache.Close()) }()
	cfg.Cache.Notify = func(text string) { log.WarnContext(ctx, "cache damaged", "err", text) }
	server, err := serverURL(cmd)
	if err != nil {
		return err
	}
	catalogue := api.NewClient(cmd.String("server"), cmd.String("token"), nil)
	token := func() (string, error) { return cmd.String("token"), nil }
	if file := cmd.String("token-file"); file != "" && cmd.String("token") == "" {
		if _, err := api.ReadToken(file); err != nil {
			return err
		}
		catalogue, token = catalogue.WithTokenFile(file), func() (string, error) { return api.ReadToken(file) }
	}
	cfg.Registry = addServerToken(server, token, cfg.Registry)
	// Only a wrong setting ends the program here. Any other error may be temporary; if it is not, each build reports
	// it.
	if err := checkPlaces(ctx, cfg); fault.Is(err, fault.Usage) {
		return err
	}
	tell, err := startTelemetry(ctx, cmd, cfg.Cache, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tell.Close()) }()
	hard, stop := cli.Grace(ctx, cmd.Duration("grace"))
	defer stop()
	return worker.Run(ctx, worker.Config{
		Grace: cmd.Duration("grace"), Cancel: hard.Done(), Telemetry: tell,
		ID: cmd.String("id"), State: cmd.String("state-dir"), QueueURL: cmd.String("queue"),
		Concurrency: cmd.Int("concurrency"),
		Server:      catalogue, Log: log,
		Make: func(ctx context.Context, r pipeline.Request, out io.Writer, line *timeline.Run) (*pipeline.Result, error) {
			res, err := pipeline.Run(ctx, cfg, r, out, line)
			if _, terr := trimCache(ctx, cmd, cfg.Cache); terr != nil {
				log.WarnContext(ctx, "cache not trimmed", "err", terr)
			}
			return res, err
		},
	})
}

// addServerToken wraps a function that returns the registry options of a destination. If the registry is part of the
// server, the options get the scheme of --server and the server's token.
func addServerToken(
	server *url.URL,
	token func() (string, error),
	options func(string) registry.Options,
) func(string) registry.Options {
	return func(destination string) registry.Options {
		o := options(destination)
		if host, _, _ := strings.Cut(destination, "/"); host != server.Host {
			return o
		}
		o.Plain = o.Plain || server.Scheme == "http"
		// If the token cannot be read, send no token. The registry's error then says what is missing.
		if secret, err := token(); err == nil && o.Password == "" {
			o.Username, o.Password = "token", secret
		}
		return o
	}
}
