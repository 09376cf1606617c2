package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/cli"
)

func tokensCommand() *ucli.Command {
	return &ucli.Command{
		Name: "tokens", Usage: "make, list and revoke tokens",
		Description: `Each caller gets a token of its own, with the scopes that it needs:
  ask       nodes: request builds for known kernels, report on drivers
  announce  pipelines: announce COS builds, request any build; includes ask
  build     builders: report builds, record artifacts
  push      builders: write to the registry
  operate   people: change wish lists, cancel, yank, remove; includes announce
  admin     people: tokens and the audit log; includes all other scopes`,
		Commands: []*ucli.Command{listTokensCommand(), createTokenCommand(), revokeTokenCommand()},
	}
}

func listTokensCommand() *ucli.Command {
	return list("list", "list tokens, without their secrets", writeFlags(),
		func(ctx context.Context, c *api.Client, _ *ucli.Command) ([]api.Token, error) { return c.Tokens(ctx) }, printTokens)
}

func createTokenCommand() *ucli.Command {
	return &ucli.Command{
		Name: "create", Usage: "make a token, and print its secret, which cannot be printed again", ArgsUsage: "NAME",
		Flags: writeFlags(
			&ucli.StringSliceFlag{Name: "scope", Required: true,
				Usage: "`SCOPE` of the token; to list all scopes: server tokens --help"},
			cli.Duration("life", 90*24*time.Hour, "`TIME` for which the token is valid, at most two years"),
		),
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			name, err := oneArg(cmd, "NAME", "give the token the name of its holder, such as node-pool-a")
			if err != nil {
				return err
			}
			c, err := client(cmd)
			if err != nil {
				return err
			}
			t, err := c.CreateToken(ctx, api.NewToken{Name: name, Scopes: cmd.StringSlice("scope"),
				LifeSeconds: int64(cmd.Duration("life") / time.Second)})
			if err != nil {
				return err
			}
			return cli.Print(cmd, t, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, t.Secret)
				return err
			})
		},
	}
}

func revokeTokenCommand() *ucli.Command {
	return quietCommand("revoke", "revoke a token at once", "ID",
		"take the id from the list of tokens: server tokens list",
		func(ctx context.Context, c *api.Client, id string) error { return c.RevokeToken(ctx, id) })
}

func printTokens(w io.Writer, all []api.Token) error {
	rows := [][]string{}
	for _, t := range all {
		state := "until " + t.ExpiresAt.Format(time.DateOnly)
		switch {
		case t.RevokedAt != nil:
			state = "revoked"
		case time.Now().After(t.ExpiresAt):
			state = "expired"
		}
		rows = append(rows, []string{t.ID, cut(t.Name, 16), state, strings.Join(t.Scopes, ",")})
	}
	return printTable(
		w,
		[]string{"ID", "NAME", "STATE", "SCOPES"},
		rows,
		"no token was made yet; make one: server tokens create NAME --scope SCOPE",
	)
}

func printAudit(w io.Writer, all []api.AuditEntry) error {
	rows := [][]string{}
	for _, e := range all {
		rows = append(
			rows,
			[]string{e.At.UTC().Format("2006-01-02 15:04"), cut(e.Actor, 20), strconv.Itoa(e.Status), e.Method + " " + e.Path},
		)
	}
	return printTable(w, []string{"AT", "ACTOR", "STATUS", "CALL"}, rows, "no such change is recorded")
}
