package cli

import (
	"fmt"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"
)

// manual returns the man(1) pages by file name: one for the program and one for each command. Their language is man(7).
func manual(root *ucli.Command) map[string]string {
	root.Commands = append(root.Commands, completionCommands(root)...)
	prepare(root)
	pages := map[string]string{}
	for _, cmd := range slices.Concat([]*ucli.Command{root}, root.Commands) {
		if cmd.Hidden || cmd.Name == "version" || cmd.Name == "help" {
			continue
		}
		name := root.Name
		if cmd != root {
			name += "-" + cmd.Name
		}
		pages["man/"+name+".1"] = manPage(root, cmd, name)
	}
	return pages
}

func manPage(root, cmd *ucli.Command, name string) string {
	var b strings.Builder
	fmt.Fprintf(&b, ".\\\" Generated from the command's own help: make generate.\n.TH %s 1 \"\" Prebake \"Prebake "+
		"Manual\"\n", strings.ToUpper(name))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(name), roff(cmd.Usage))
	b.WriteString(".SH SYNOPSIS\n")
	first := true
	eachSynopsis(root, cmd, func(words, rest string) {
		if !first {
			b.WriteString(".br\n")
		}
		first = false
		fmt.Fprintf(&b, ".B %s\n%s\n", roff(words), roff(rest))
	})
	b.WriteString(".SH DESCRIPTION\n")
	if cmd == root {
		b.WriteString(roff(root.Name) + " has these commands. Each has a page of its own.\n")
		for _, sub := range cmd.Commands {
			if !sub.Hidden && sub.Name != "help" {
				fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", roff(sub.Name), roff(sub.Usage))
			}
		}
	}
	manText(&b, cmd.Description, cmd == root)
	manFlags(&b, ".SH OPTIONS\n", cmd)
	for _, sub := range cmd.Commands {
		if cmd == root || sub.Hidden || sub.Name == "help" {
			continue
		}
		fmt.Fprintf(&b, ".SH %s\n%s.\n", strings.ToUpper(roff(cmd.Name+" "+sub.Name)), roff(upperFirst(sub.Usage)))
		manText(&b, sub.Description, true)
		manFlags(&b, "", sub)
	}
	if text := environment(cmd.Flags); text != "" {
		fmt.Fprintf(&b, ".SH ENVIRONMENT\n%s\n", roff(text))
	}
	b.WriteString(".SH EXIT STATUS\n0 when done. Other codes name the kind of failure; they are the same for all " +
		"programs:\n" +
		"docs/reference/exit-codes.md in the source has the list.\n")
	if cmd != root {
		fmt.Fprintf(&b, ".SH SEE ALSO\n.BR %s (1)\n", roff(root.Name))
	}
	return b.String()
}

func upperFirst(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// eachSynopsis passes each way to call a command to the callback: its words, and the arguments after them.
func eachSynopsis(root, cmd *ucli.Command, f func(words, rest string)) {
	switch {
	case cmd == root:
		f(root.Name, "COMMAND [flags]")
		return
	case cmd.ArgsUsage != "" || len(cmd.Commands) == 0 || len(cmd.Flags) > 0:
		f(root.Name+" "+cmd.Name, strings.TrimSpace("[flags] "+cmd.ArgsUsage))
	}
	for _, sub := range cmd.Commands {
		if !sub.Hidden && sub.Name != "help" {
			f(root.Name+" "+cmd.Name+" "+sub.Name, strings.TrimSpace("[flags] "+sub.ArgsUsage))
		}
	}
}

// manText writes a description, in a new paragraph if other text comes before it. Indented lines, such as examples,
// keep their line breaks.
func manText(b *strings.Builder, text string, follows bool) {
	if text == "" {
		return
	}
	if follows {
		b.WriteString(".PP\n")
	}
	verbatim := false
	after := false // after an empty line, which ends a paragraph
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		indented := strings.HasPrefix(line, " ")
		switch {
		case strings.TrimSpace(line) == "":
			after = true
			continue
		case indented && !verbatim:
			b.WriteString(".PP\n.nf\n")
		case !indented && verbatim:
			b.WriteString(".fi\n.PP\n")
		case after:
			b.WriteString(".PP\n")
		}
		verbatim, after = indented, false
		b.WriteString(roff(line) + "\n")
	}
	if verbatim {
		b.WriteString(".fi\n")
	}
}

func manFlags(b *strings.Builder, heading string, cmd *ucli.Command) {
	headings, groups := groupFlags(cmd.VisibleFlags())
	written := false
	for _, group := range headings {
		var rows [][2]string
		for _, f := range groups[group] {
			if f.Names()[0] != "help" && f.Names()[0] != "version" {
				rows = append(rows, flagRow(f))
			}
		}
		if len(rows) == 0 {
			continue
		}
		if !written {
			b.WriteString(heading)
			written = true
		}
		if group != "Flags" {
			fmt.Fprintf(b, ".SS %s\n", roff(group))
		}
		for _, row := range rows {
			fmt.Fprintf(b, ".TP\n.B %s\n%s\n", roff(row[0]), roff(row[1]))
		}
	}
}

// roff escapes text for man(7): backslashes, hyphens, and a dot or a quote that begins a line.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...", "\u00a0", " ").Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
