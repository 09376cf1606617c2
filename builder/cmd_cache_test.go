package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ucli "github.com/urfave/cli/v3"

	"github.com/prebake/prebake/pkg/cas"
	"github.com/prebake/prebake/pkg/cli"
)

// runOne executes a single command, without the other commands of the program.
func runOne(t *testing.T, command *ucli.Command, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	root := &ucli.Command{Name: "builder", Commands: []*ucli.Command{command}}
	code = cli.Run(t.Context(), root, append([]string{"builder"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

// TestCache lists and trims a cache with the commands that an operator uses.
func TestCache(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "cache")
	cache, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"old", "new"} {
		_, _, err := cache.Tree(t.Context(), "headers-v1", key, func(_ context.Context, dir string) error {
			return os.WriteFile(filepath.Join(dir, "a"), make([]byte, 1<<20), 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	ago := time.Now().Add(-800 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, "uses/headers-v1@old"), ago, ago); err != nil {
		t.Fatal(err)
	}
	trim := func(more ...string) []string { return append([]string{"cache", "trim", "--cache", dir}, more...) }
	for _, row := range []struct {
		name   string
		args   []string
		code   int
		output string
	}{
		{"in use", trim("--older-than", "720h"), 0, "removed 0 entries, 0 B; "},
		{"in use says so", trim("--older-than", "720h"), 0, "1 entries stay, they are in use"},
		{"no limit", trim(), 2, "hint:  give --max-size"},
		{"bad size", trim("--max-size", "huge"), 2, "want a number with a unit, such as 20GiB"},
		{"nothing is no size", trim("--max-size", "0"), 2, "want a number with a unit, such as 20GiB"},
		{"unknown", []string{"cache", "wipe"}, 2, `no command "wipe"`},
	} {
		code, out, errs := runOne(t, cacheCommand(), row.args...)
		if code != row.code || !strings.Contains(out+errs, row.output) {
			t.Errorf("%s: %v = %d\n%s%s\nwant %d with %q", row.name, row.args, code, out, errs, row.code, row.output)
		}
	}
	if err := cache.Close(); err != nil {
		t.Fatal(err)
	}
	list := func() (kinds map[string]cas.Kind) {
		code, out, errs := runOne(t, cacheCommand(), "cache", "--cache", dir, "--output", "json")
		var got struct {
			Dir   string
			Kinds []cas.Kind
		}
		if err := json.Unmarshal([]byte(out), &got); code != 0 || err != nil || got.Dir != dir {
			t.Fatalf("cache --output json = %d, %v\n%s%s", code, err, out, errs)
		}
		kinds = map[string]cas.Kind{}
		for _, k := range got.Kinds {
			kinds[k.Name] = k
		}
		return kinds
	}
	if k := list()["headers-v1"]; k.Entries != 2 || k.Bytes != 2<<20 || k.InUse != 0 {
		t.Errorf("headers = %+v; want two of 1 MiB", k)
	}
	if _, out, _ := runOne(t, cacheCommand(), trim("--older-than", "720h", "--dry-run")...); !strings.Contains(out,
		"would remove 1 entries, 1.0 MiB; ") {
		t.Errorf("dry run says\n%s", out)
	}
	if k := list()["headers-v1"]; k.Entries != 2 {
		t.Errorf("after the dry run: %+v; want both", k)
	}
	if _, out, _ := runOne(t, cacheCommand(), trim("--older-than", "720h")...); !strings.Contains(out, "headers-v1") ||
		!strings.Contains(out, "removed 1 entries") {
		t.Errorf("trim says\n%s", out)
	}
	if k := list()["headers-v1"]; k.Entries != 1 {
		t.Errorf("after the trim: %+v; want one", k)
	}
	_, out, _ := runOne(t, cacheCommand(), "cache", "--cache", dir)
	for line := range strings.Lines(out) {
		if len(line) > 81 && !strings.HasPrefix(line, dir) {
			t.Errorf("a line of %d columns: %s", len(line)-1, line)
		}
	}
	if !strings.Contains(out, "headers-v1") || !strings.Contains(out, "total") {
		t.Errorf("list:\n%s", out)
	}
}

// TestTrimCache checks that the cache has no size limit without --cache-size.
func TestTrimCache(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cache, err := cas.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cache.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, row := range []struct {
		flags []string
		left  bool
	}{{nil, true}, {[]string{"--cache-size", "1GiB"}, true}, {[]string{"--cache-size", "1B"}, false}} {
		if err := cache.PutFact("verdict", "k", []byte("v")); err != nil {
			t.Fatal(err)
		}
		command := &ucli.Command{Name: "x", Flags: []ucli.Flag{cacheSizeFlag()},
			Action: func(ctx context.Context, cmd *ucli.Command) error {
				_, err := trimCache(ctx, cmd, cache)
				return err
			}}
		if code, _, errs := runOne(t, command, append([]string{"x"}, row.flags...)...); code != 0 {
			t.Fatalf("%v = %d %s", row.flags, code, errs)
		}
		if _, left := cache.Fact("verdict", "k"); left != row.left {
			t.Errorf("%v: left %t; want %t", row.flags, left, row.left)
		}
	}
	if code, _, errs := runOne(t, &ucli.Command{Name: "x", Flags: []ucli.Flag{cacheSizeFlag()}}, "x", "--cache-size",
		"lots"); code != 2 || !strings.Contains(errs, "20GiB") {
		t.Errorf("a bad size = %d %s; want 2 and an example", code, errs)
	}
}

func TestMetricsFlag(t *testing.T) {
	t.Parallel()
	command := &ucli.Command{Name: "x", Flags: []ucli.Flag{metricsFlag()},
		Action: func(ctx context.Context, cmd *ucli.Command) error {
			tel, err := startTelemetry(ctx, cmd, nil, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			_, err = cmd.Root().Writer.Write([]byte(tel.Address()))
			return errors.Join(err, tel.Close())
		}}
	if code, out, errs := runOne(t, command, "x"); code != 0 || out != "" {
		t.Errorf("without the flag: %d %q %s; want nothing served", code, out, errs)
	}
	if code, out, errs := runOne(t, command, "x", "--metrics-address", "127.0.0.1:0"); code != 0 ||
		!strings.HasPrefix(out, "127.0.0.1:") {
		t.Errorf("with the flag: %d %q %s; want it served", code, out, errs)
	}
}
