package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/bundle"
	"github.com/prebake/prebake/pkg/cli"
)

func serveCommand() *ucli.Command {
	listen := cli.String("listen", "127.0.0.1:8440",
		"`ADDRESS` to listen on; with port 0, the server takes a free port; its URL is in the file address in --data")
	listen.Validator = func(s string) error {
		if _, _, err := net.SplitHostPort(s); err != nil {
			return fmt.Errorf("listen %q: want HOST:PORT, or :PORT", s)
		}
		return nil
	}
	createOnly := cli.Strings("create-only", "`PATTERN` of registry repositories in which no tag can be moved")
	createOnly.Value = []string{"prebake/*", "prebake/*/*"}
	return cli.WithConfig(&ucli.Command{
		Name: "serve", Usage: "run the server until a stop signal",
		Description: `Examples:
  server serve --data /var/lib/prebake --kernel-mirror gs://cos-tools
  server serve --config server.yaml --log-level debug`,
		Flags: append(append(
			cli.Group(cli.From,
				cli.String("kernel-mirror", "", "`URL` of COS's release bucket, to discover kernels: gs://, https:// or file://"),
				cli.String("driver-mirror", "", "`URL` of the bucket with NVIDIA's runfiles, to discover drivers"),
				cli.String("gke-map", "", "`URL` of Google's gke-to-cos.json, which names the COS build of each GKE version"),
				cli.Duration("discover-interval", 15*time.Minute,
					"`TIME` between two checks of the buckets for new kernels and drivers"),
			),
			cli.Group(cli.To,
				listen,
				cli.String("public-repository", "/prebake/driver",
					"`REPOSITORY` where builders publish artifacts; a name that begins with / is on this server"),
				defaultsTo(cli.String("data", "",
					"`FOLDER` for all data of the server"), "$XDG_STATE_HOME/prebake, or /var/lib/prebake for root"),
				defaultsTo(databaseFlag("database",
					"`URL` of the catalogue's database: sqlite:///PATH or postgres://…"), "catalogue.db in --data"),
				cli.String("snapshot", "", "serve the snapshot in `FOLDER`, as \"builder snapshot make\" wrote it, under "+
					"/snapshot/"),
				defaultsTo(databaseFlag("queue", "`URL` of the build queue's database"),
					"queue.db in --data, or --database if that is PostgreSQL"),
				publicFlag(), redistributeFlag(),
				createOnly,
			)...),
			append(cli.Group(cli.Trust,
				cli.String("token", "", "the server's first `TOKEN`, which has all scopes; prefer --token-file"),
				defaultsTo(cli.String("token-file", "", "`FILE` with the first token"), "token in --data, made at the first start"),
				cli.String("oidc", "", "`FILE` with rules that say which OpenID Connect tokens may do what"),
				cli.String("tls-cert", "",
					"`FILE` with a certificate (PEM), to listen with TLS; the server reads a changed file again"),
				cli.String("tls-key", "", "`FILE` with the private key of --tls-cert"),
				cli.Range("quarantine", 3, 0, 1_000_000,
					"put an artifact into quarantine if it fails on `COUNT` nodes within a day; 0 means no quarantine"),
			), append(cli.Group(cli.Resources,
				cli.Range("reserve", 1024, 0, 1<<30,
					"refuse uploads while the disk of --data has less than `MIB` mebibytes free"),
				cli.Range("verify-rate", 8, 0, 100_000, "verify blobs at `MIB` mebibytes/s; 0: never"),
				cli.Range("keep-builds", 365, 0, 36_500,
					"remove builds and logs `DAYS` days after their end, except the newest 50 of each cell; 0 keeps all"),
				cli.Range("keep-logs", 14, 0, 36_500,
					"remove logs `DAYS` days after their builds, except a failing cell's first and last; 0 keeps all"),
				cli.Range("ask-rate", 120, 1, 1_000_000, "let a node's token request at most `COUNT` builds per hour"),
				cli.Range("client-rate", 30_000, 0, 1_000_000_000,
					"accept at most `COUNT` requests per minute from one IP address; 0 means no limit"),
			), append(cli.Group(cli.Advanced,
				cli.Duration("grace", 20*time.Second, "`TIME` to wait for open requests when the server stops"),
			), cli.Group(cli.Advanced, cli.LogFlags()...)...)...)...)...),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			log, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			s := serveSettings(cmd)
			if err := s.complete(); err != nil {
				return err
			}
			return serve(ctx, s, log)
		},
	}, cli.Config{
		Secrets: map[string]string{"token": "token-file, or the variable PREBAKE_TOKEN"},
		Check: func(cmd *ucli.Command) error {
			s := serveSettings(cmd)
			return s.complete()
		},
	})
}

func serveSettings(cmd *ucli.Command) settings {
	return settings{
		Listen: cmd.String("listen"), Data: cmd.String("data"),
		Database: cmd.String("database"), Queue: cmd.String("queue"),
		KernelMirror: cmd.String("kernel-mirror"), DriverMirror: cmd.String("driver-mirror"),
		GKEMap:           cmd.String("gke-map"),
		PublicRepository: cmd.String("public-repository"), Snapshot: cmd.String("snapshot"),
		Token: cmd.String("token"), TokenFile: cmd.String("token-file"), Issuers: cmd.String("oidc"),
		TLSCert: cmd.String("tls-cert"), TLSKey: cmd.String("tls-key"),
		Public: cmd.Bool("public"), Redistribute: bundle.Redistribution(cmd.String("redistribute")),
		CreateOnly: cmd.StringSlice("create-only"), ReserveMB: cmd.Int("reserve"), Quarantine: cmd.Int("quarantine"),
		KeepBuilds: cmd.Int("keep-builds"), KeepLogs: cmd.Int("keep-logs"), VerifyMB: cmd.Int("verify-rate"),
		DiscoverEvery: cmd.Duration("discover-interval"), Grace: cmd.Duration("grace"),
		BuildsPerHour: cmd.Int("ask-rate"), CallsPerMinute: cmd.Int("client-rate"),
	}
}

// databaseFlag returns a flag with the URL of a database.
func databaseFlag(name, usage string) *ucli.StringFlag {
	f := cli.String(name, "", usage)
	f.Validator = func(s string) error {
		for _, scheme := range []string{"sqlite:///", "postgres://", "postgresql://"} {
			if strings.HasPrefix(s, scheme) {
				return nil
			}
		}
		if s == "" { // the environment variable is set and empty
			return nil
		}
		// The error does not quote the value, which may contain a password.
		return fmt.Errorf("%s: want sqlite:///PATH or postgres://…", name)
	}
	return f
}

// defaultsTo sets the text that help shows as the default of a flag.
func defaultsTo(f *ucli.StringFlag, text string) *ucli.StringFlag {
	f.DefaultText = text
	return f
}
