package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prebake/prebake/pkg/api"
)

// columns is the maximum width of a table, in characters: the width of the usual terminal.
const columns = 80

// minLastColumn is the minimum width of the last column, in characters, unless its texts are shorter.
const minLastColumn = 12

// printTable prints rows as a table with a head. If there are no rows, it prints the text none instead. The last column
// is cut to fit. If less than minLastColumn is left for the last column, the widest other columns are cut, too.
func printTable(w io.Writer, head []string, rows [][]string, none string) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, none)
		return err
	}
	width := make([]int, len(head))
	for _, row := range append([][]string{head}, rows...) {
		for i, text := range row {
			width[i] = max(width[i], utf8.RuneCountInString(text))
		}
	}
	last := len(width) - 1
	for over := 2*last + min(width[last], minLastColumn) - columns; ; {
		sum, widest := 0, 0
		for i, n := range width[:last] {
			sum += n
			if n > width[widest] {
				widest = i
			}
		}
		if sum+over <= 0 {
			break
		}
		width[widest]--
	}
	for _, row := range append([][]string{head}, rows...) {
		var line strings.Builder
		left := columns
		for i, text := range row {
			if i == len(row)-1 {
				line.WriteString(cut(text, left))
				break
			}
			text = cut(text, width[i])
			line.WriteString(text + strings.Repeat(" ", width[i]-utf8.RuneCountInString(text)+2))
			left -= width[i] + 2
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(line.String(), " ")); err != nil {
			return err
		}
	}
	return nil
}

// cut shortens a text to one line of n characters.
func cut(text string, n int) string {
	text, _, _ = strings.Cut(text, "\n")
	if utf8.RuneCountInString(text) <= n {
		return text
	}
	return string([]rune(text)[:max(n-3, 0)]) + "..."
}

// printFields prints a line for each pair of a name and a value, and leaves out pairs with an empty value.
func printFields(w io.Writer, fields [][2]string) error {
	for _, f := range fields {
		if f[1] == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%-10s %s\n", f[0], f[1]); err != nil {
			return err
		}
	}
	return nil
}

func milestone(k api.Kernel) string {
	if k.Milestone == 0 {
		return "-"
	}
	return strconv.Itoa(k.Milestone)
}

// printGKE prints kernels with their GKE versions, for a reader who asked for a GKE version.
func printGKE(w io.Writer, all []api.Kernel) error {
	var rows [][]string
	for _, k := range all {
		rows = append(rows, []string{k.BuildID, k.Board, milestone(k), orDash(k.Default), orDash(strings.Join(k.GKE, " "))})
	}
	return printTable(w, []string{"BUILD_ID", "BOARD", "M", "DEFAULT", "GKE"}, rows,
		"no kernel of this GKE version is known yet")
}

func printKernels(w io.Writer, all []api.Kernel) error {
	var rows [][]string
	for _, k := range all {
		rows = append(
			rows,
			[]string{k.BuildID, k.Board, milestone(k), orDash(k.Fingerprint.Short()), orDash(k.Default), orDash(k.Release)},
		)
	}
	return printTable(w, []string{"BUILD_ID", "BOARD", "M", "ABI", "DEFAULT", "RELEASE"}, rows, "no kernel is known yet")
}

func printDrivers(w io.Writer, all []api.DriverRelease) error {
	var rows [][]string
	for _, d := range all {
		var flavours []string
		for _, f := range d.Flavours {
			flavours = append(flavours, string(f))
		}
		rows = append(rows, []string{d.Version, d.Branch, orDash(strings.Join(flavours, ", "))})
	}
	return printTable(w, []string{"VERSION", "BRANCH", "FLAVOURS"}, rows, "no driver is known yet")
}

func printArtifacts(w io.Writer, all []api.Artifact) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "nothing is published yet")
		return err
	}
	for _, a := range all {
		var kernels []string
		for _, k := range a.Kernels {
			kernels = append(kernels, k.String())
		}
		err := printFields(w, [][2]string{
			{"digest", a.Digest}, {"driver", a.Driver.String()}, {"state", strings.TrimSpace(string(a.State) + " " + a.Reason)},
			{
				"instead",
				a.Replacement,
			}, {"in", a.Repository}, {"abi", a.Fingerprint.Short()}, {"for", strings.Join(kernels, "\n           ")},
		})
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	return nil
}

func printBuilds(w io.Writer, all []api.Build) error {
	var rows [][]string
	for _, b := range all {
		note := b.Phase
		if b.Class != "" {
			note = b.Class + ": " + b.Error
		}
		rows = append(rows, []string{strconv.FormatInt(b.ID, 10), string(b.State), b.Kernel.String(), b.Driver.String(),
			note})
	}
	return printTable(w, []string{"ID", "STATE", "KERNEL", "DRIVER", "NOTE"}, rows, "no build was requested yet")
}

func printResolution(w io.Writer, base string, r api.Resolution) error {
	repository := r.Repository
	if strings.HasPrefix(repository, "/") {
		_, host, _ := strings.Cut(base, "://")
		repository = host + repository
	}
	driver := r.Driver.String()
	if r.Driver.Version == "" {
		driver = ""
	}
	build := ""
	if r.Build != nil {
		build = strconv.FormatInt(r.Build.ID, 10)
	}
	position, eta := "", ""
	if r.Position > 0 {
		position = fmt.Sprintf("%d in the queue", r.Position)
	}
	if r.ETA != nil {
		eta = "about " + r.ETA.Format(time.RFC3339)
	}
	return printFields(w, [][2]string{
		{"kernel", r.Kernel.String()}, {"driver", driver}, {"state", string(r.State)}, {"repository", repository},
		{"digest", r.Digest}, {"build", build}, {"position", position}, {"ready", eta},
		{"reason", r.Reason}, {"instead", r.Replacement}, {"hint", r.Hint},
	})
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
