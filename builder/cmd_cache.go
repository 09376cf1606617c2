package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/builder/internal/pipeline"
	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
	"github.com/prebake/prebake/pkg/fault"
)

// buildNeeds is the disk space in bytes that a build takes at its peak. docs/decisions/0016 has the measurement.
const buildNeeds = 4 << 30

func cacheFlag() ucli.Flag {
	return homeDefault(cli.String("cache", defaultCache(), "`FOLDER` of the cache"))
}

// homeDefault lets --help show the flag's default with ~ in place of the user's home folder.
func homeDefault(f *ucli.StringFlag) *ucli.StringFlag {
	if home, err := os.UserHomeDir(); err == nil && home != "/" {
		if rest, ok := strings.CutPrefix(f.Value, home+"/"); ok {
			f.DefaultText = "~/" + rest
		}
	}
	return f
}

// cacheSizeFlag returns the flag of the commands build and work that limits the size of the cache (see trimCache).
func cacheSizeFlag() ucli.Flag {
	f := cli.String("cache-size", "", "keep the cache below `SIZE`, such as 20GiB")
	f.Validator = validSize
	return f
}

func validSize(text string) error { _, err := parseSize(text); return err }

// parseSize parses a size in bytes, such as 20GiB, 500MB or 1000000. For "" it returns 0.
func parseSize(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n == 0 || n > 1<<60 {
		return 0, fmt.Errorf("size %q: want a number with a unit, such as 20GiB", text)
	}
	return int64(n), nil
}

// trimCache removes the entries that were unused for the longest time, until the cache is at most as large as
// --cache-size. Without this flag, trimCache does nothing.
func trimCache(ctx context.Context, cmd *ucli.Command, cache *cas.Cache) (*cas.Trimmed, error) {
	size, err := parseSize(cmd.String("cache-size"))
	if err != nil || size == 0 {
		return &cas.Trimmed{}, err
	}
	return cache.Trim(ctx, cas.Limit{Bytes: size})
}

// freshMinFree is the disk space in bytes that trimCaches keeps free without --cache-size. To keep it free, trimCaches
// removes entries from Config.Fresh. A build needs up to 4 GiB at its peak, and two builds may run.
const freshMinFree = 8 << 30

// trimCaches trims the caches of a pass over a wish list. With --max-age, a pass has two caches: Config.Cache and, in
// its folder, Config.Fresh for the builds that replace artifacts older than --max-age. The size of Config.Cache
// includes the size of Config.Fresh. Fresh may take half of --cache-size, so that fetched inputs and the products of
// other builds have the rest. Without --cache-size, Fresh shrinks when the disk has less than freshMinFree.
func trimCaches(ctx context.Context, cmd *ucli.Command, cfg pipeline.Config) error {
	size, err := parseSize(cmd.String("cache-size"))
	if cfg.Fresh != nil && err == nil {
		limit := cas.Limit{Bytes: size / 2}
		if size == 0 { // then nothing else limits the size of Fresh
			limit.MinFree = freshMinFree
		}
		_, err = cfg.Fresh.Trim(ctx, limit)
	}
	_, terr := trimCache(ctx, cmd, cfg.Cache)
	return errors.Join(err, terr)
}

func cacheCommand() *ucli.Command {
	return &ucli.Command{
		Name:   "cache",
		Usage:  "list the contents of the cache",
		Flags:  []ucli.Flag{cacheFlag(), cli.OutputFlag()},
		Action: listCache,
		Commands: []*ucli.Command{{
			Name:  "trim",
			Usage: "remove the entries that were not used for the longest time",
			Description: `Trim at any time: entries that a running builder uses are never removed. A build
fetches or makes a removed entry again when it needs this entry.`,
			Flags: []ucli.Flag{
				cacheFlag(),
				&ucli.StringFlag{Name: "max-size", Usage: "remove entries until the cache is at most `SIZE`, such as 20GiB",
					Validator: validSize},
				&ucli.StringFlag{Name: "min-free", Usage: "remove entries until the disk has `SIZE` free", Validator: validSize},
				&ucli.DurationFlag{Name: "older-than", Usage: "remove entries that were not used for `TIME`, such as 720h"},
				&ucli.BoolFlag{Name: "dry-run", Usage: "remove nothing; print what would be removed"},
				cli.OutputFlag(),
			},
			Action: runTrim,
		}},
	}
}

// withCache opens the cache, passes it to the callback, and closes it afterwards.
func withCache(cmd *ucli.Command, do func(*cas.Cache) error) error {
	cache, err := cas.Open(cmd.String("cache"))
	if err != nil {
		return err
	}
	return errors.Join(do(cache), cache.Close())
}

func listCache(ctx context.Context, cmd *ucli.Command) error {
	if name := cmd.Args().First(); name != "" {
		return fault.New(fault.Usage, fmt.Sprintf("%s has no command %q", cmd.FullName(), name),
			"see "+cmd.FullName()+" --help")
	}
	return withCache(cmd, func(cache *cas.Cache) error {
		kinds, err := cache.Kinds(ctx)
		if err != nil {
			return err
		}
		var total int64
		for _, k := range kinds {
			total += k.Bytes
		}
		list := struct {
			Dir   string     `json:"dir"`
			Bytes int64      `json:"bytes"`
			Kinds []cas.Kind `json:"kinds"`
		}{cache.Dir(), total, kinds}
		return cli.Print(cmd, list, func(w io.Writer) error {
			if _, err := fmt.Fprintf(w, "%s\n%s", list.Dir, kindTable(kinds, true)); err != nil {
				return err
			}
			_, err := fmt.Fprintf(w, "%-24s %8s %10s\n", "total", "", humanize.IBytes(uint64(total)))
			return err
		})
	})
}

// kindTable returns a table, at most 80 columns wide, with one row for each kind of cache entry. If used is true, the
// table also shows how many entries are in use, and when one was last used.
func kindTable(kinds []cas.Kind, used bool) string {
	text := fmt.Sprintf("%-24s %8s %10s", "KIND", "ENTRIES", "SIZE")
	if used {
		text += fmt.Sprintf(" %8s  %s", "IN USE", "LAST USE")
	}
	text += "\n"
	for _, k := range kinds {
		text += fmt.Sprintf("%-24.24s %8d %10s", k.Name, k.Entries, humanize.IBytes(uint64(k.Bytes)))
		if used {
			last := "-"
			if !k.LastUse.IsZero() {
				last = k.LastUse.UTC().Format(time.DateTime)
			}
			text += fmt.Sprintf(" %8d  %s", k.InUse, last)
		}
		text += "\n"
	}
	return text
}

func runTrim(ctx context.Context, cmd *ucli.Command) error {
	limit := cas.Limit{OlderThan: cmd.Duration("older-than"), DryRun: cmd.Bool("dry-run")}
	var err error
	if limit.Bytes, err = parseSize(cmd.String("max-size")); err != nil {
		return err
	}
	if limit.MinFree, err = parseSize(cmd.String("min-free")); err != nil {
		return err
	}
	if limit.Bytes == 0 && limit.MinFree == 0 && limit.OlderThan <= 0 {
		return fault.New(fault.Usage, "trim cache: no limit is given",
			"give --max-size, --min-free or --older-than, such as --max-size 20GiB")
	}
	return withCache(cmd, func(cache *cas.Cache) error {
		done, err := cache.Trim(ctx, limit)
		if err != nil {
			return err
		}
		if done.Busy {
			return fault.New(fault.Busy, "another process is trimming "+cache.Dir(),
				"wait until that process ends, then run the command again")
		}
		return cli.Print(cmd, done, func(w io.Writer) error {
			verb := "removed"
			if limit.DryRun {
				verb = "would remove"
			}
			_, err := fmt.Fprintf(w, "%s%s %d entries, %s; %s left", kindTable(done.Kinds, false), verb, done.Removed,
				humanize.IBytes(uint64(done.Freed)), humanize.IBytes(uint64(done.Left)))
			if err == nil && done.InUse > 0 {
				_, err = fmt.Fprintf(w, "; %d entries stay, they are in use", done.InUse)
			}
			if err == nil {
				_, err = fmt.Fprintln(w)
			}
			return err
		})
	})
}
