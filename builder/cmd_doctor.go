package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/doctor"
	"github.com/prebake/prebake/pkg/cli"
)

// doctorCommand returns the command doctor. The command accepts those flags of build and work whose values it can
// check, and requires no flag.
func doctorCommand() *ucli.Command {
	return &ucli.Command{
		Name:  "doctor",
		Usage: "check that this machine has what builds need, and list what is missing",
		Description: `doctor takes the flags and environment variables of build and work. It checks
mirrors, destinations and the key if you name them, and changes nothing. The
exit status is the one of the first check that fails.`,
		Flags: slices.Concat(
			cli.Group(groupWhat, cli.Bool("btf", "also check the tools for the flag --btf of build")),
			cli.Group(groupFrom,
				cli.String("kernel-mirror", "", "check that the COS release bucket at `URL` can be read"),
				cli.String("driver-mirror", "", "check that the bucket with NVIDIA's runfiles at `URL` can be read"),
			),
			cli.Group(groupTo,
				cli.Strings("to", "check that the destination `REF` can be written"),
				privateFlag(), redistributeFlag(),
				cli.String("username", "", "user `NAME` for the first registry in --to"),
				cli.String("password", "", "`PASSWORD` or token for the first registry in --to"),
			),
			cli.Group(groupTrust,
				cli.String("key", "", "check the signing `KEY`: file, KMS URI or keyless:SIGNING_CONFIG"),
				identityTokenFlag(),
				cli.TrustedRootFlag(),
			),
			programFlags(),
			cli.Group(groupResources,
				cacheFlag(),
				cli.Int("jobs", 0, "run `COUNT` compilers at once; 0 means one for each processor"),
			),
			cli.Group(groupOutput, cli.OutputFlag()),
		),
		Action: runDoctor,
	}
}

func runDoctor(ctx context.Context, cmd *ucli.Command) error {
	to := cmd.StringSlice("to")
	c := doctor.Config{
		Cache: cmd.String("cache"), Need: buildNeeds, Jobs: cmd.Int("jobs"), BTF: cmd.Bool("btf"),
		GuestInit: cmd.String("guestinit"), NVMLProbe: cmd.String("probe"), Destinations: to, Key: cmd.String("key"),
	}
	for _, flag := range []string{"kernel-mirror", "driver-mirror"} {
		if url := cmd.String(flag); url != "" {
			c.Mirrors = append(c.Mirrors, url)
		}
	}
	keys, err := keyOptions(cmd)
	if err != nil {
		return err
	}
	report := doctor.Run(ctx, c, doctor.Real(licenceRule(cmd), credentials(cmd, to), keys...))
	if err := cli.Print(cmd, report, func(w io.Writer) error {
		_, err := io.WriteString(w, reportTable(report))
		return err
	}); err != nil {
		return err
	}
	return report.Err()
}

// reportTable returns the report as text in lines of at most 80 columns.
func reportTable(r *doctor.Report) string {
	var out strings.Builder
	for _, f := range r.Findings {
		head := fmt.Sprintf("%-5s %-12s ", f.Level, f.Check)
		writeIndented(&out, head, f.Text)
		if f.Next != "" {
			writeIndented(&out, strings.Repeat(" ", 19)+"next: ", f.Next)
		}
	}
	if r.Install != "" {
		fmt.Fprintf(&out, "\nto install everything that is missing, on Debian:\n  %s\n", r.Install)
	}
	return out.String()
}

// writeIndented writes the head and the text in lines of at most 80 columns. The second and later lines begin with as
// many spaces as the head has bytes.
func writeIndented(out *strings.Builder, head, text string) {
	const width = 80
	line := head
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
			line += word
		case len([]rune(line))+1+len([]rune(word)) > width:
			fmt.Fprintln(out, line)
			line = strings.Repeat(" ", len(head)) + word
		default:
			line += " " + word
		}
	}
	fmt.Fprintln(out, line)
}
