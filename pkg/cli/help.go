package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	ucli "github.com/urfave/cli/v3"
)

// The headings for flags in a help page, in this order. A command uses only the headings that it needs.
const (
	What      = "What"
	From      = "Where from"
	To        = "Where to"
	Trust     = "Trust"
	Resources = "Resources"
	Advanced  = "Advanced"
)

var order = []string{What, From, To, Trust, Resources, Advanced}

const (
	helpWidth  = 80 // largest width of a help page, in columns
	helpColumn = 28 // the texts of flags begin at this column at the latest
)

// Group puts flags under a heading of --help: one of the constants above.
func Group(heading string, flags ...ucli.Flag) []ucli.Flag {
	for _, f := range flags {
		if c, ok := f.(ucli.CategorizableFlag); ok {
			c.SetCategory(heading)
		}
	}
	return flags
}

// useHelp makes the library print help with helpText. The library offers only a global variable for that.
var useHelp = sync.OnceFunc(func() {
	ucli.HelpPrinter = func(w io.Writer, _ string, data any) {
		if cmd, ok := data.(*ucli.Command); ok {
			_, _ = io.WriteString(w, helpText(cmd)) // a closed terminal cannot show an error
		}
	}
})

// helpText returns the text of --help, in 80 columns.
func helpText(cmd *ucli.Command) string {
	var b strings.Builder
	line(&b, 0, cmd.FullName()+" - "+cmd.Usage)
	b.WriteString("\nUsage: " + cmd.FullName())
	commands := slices.DeleteFunc(cmd.VisibleCommands(), func(c *ucli.Command) bool { return c.Name == "help" })
	switch {
	case len(commands) > 0 && len(cmd.Flags) > 0 && cmd.Name != cmd.Root().Name:
		b.WriteString(" [COMMAND]")
	case len(commands) > 0:
		b.WriteString(" COMMAND")
	}
	b.WriteString(" [flags]")
	if cmd.ArgsUsage != "" {
		b.WriteString(" " + cmd.ArgsUsage)
	}
	b.WriteString("\n")
	if cmd.Description != "" {
		b.WriteString("\n" + strings.TrimRight(cmd.Description, "\n") + "\n")
	}
	if len(commands) > 0 {
		var rows [][2]string
		for _, c := range commands {
			rows = append(rows, [2]string{strings.Join(c.Names(), ", "), c.Usage})
		}
		section(&b, "Commands", rows)
	}
	headings, groups := groupFlags(cmd.VisibleFlags())
	for _, heading := range headings {
		var rows [][2]string
		for _, f := range groups[heading] {
			rows = append(rows, flagRow(f))
		}
		section(&b, heading, rows)
	}
	if text := environment(cmd.VisibleFlags()); text != "" {
		b.WriteString("\n")
		line(&b, 0, text)
	}
	if len(commands) > 0 {
		b.WriteString("\n")
		line(&b, 0, cmd.FullName()+" COMMAND --help says more about one command.")
	}
	return b.String()
}

// groupFlags sorts flags by heading. Flags without a heading, such as --help, come last.
func groupFlags(flags []ucli.Flag) (headings []string, groups map[string][]ucli.Flag) {
	groups = map[string][]ucli.Flag{}
	var rest []ucli.Flag
	for _, f := range flags {
		c, ok := f.(ucli.CategorizableFlag)
		if !ok || c.GetCategory() == "" {
			rest = append(rest, f)
			continue
		}
		if groups[c.GetCategory()] == nil {
			headings = append(headings, c.GetCategory())
		}
		groups[c.GetCategory()] = append(groups[c.GetCategory()], f)
	}
	slices.SortStableFunc(headings, func(a, b string) int { return slices.Index(order, a) - slices.Index(order, b) })
	if len(headings) == 0 {
		headings = []string{"Flags"}
	}
	last := headings[len(headings)-1]
	groups[last] = append(groups[last], rest...)
	return headings, groups
}

// flagRow returns the two columns of a flag: its names with the name of its value, and its description.
func flagRow(f ucli.Flag) (row [2]string) {
	var names []string
	for i, name := range f.Names() {
		switch {
		case len(name) == 1:
			names = append(names, "-"+name)
		case i == 0: // a second long name is an earlier name, which still works
			names = append(names, "--"+name)
		}
	}
	row[0] = strings.Join(names, ", ")
	doc, ok := f.(ucli.DocGenerationFlag)
	if !ok {
		return row
	}
	placeholder, usage := "", doc.GetUsage()
	if before, rest, ok := strings.Cut(usage, "`"); ok {
		if name, after, ok := strings.Cut(rest, "`"); ok {
			placeholder, usage = name, before+name+after
		}
	}
	if doc.TakesValue() {
		if placeholder == "" {
			placeholder = "VALUE"
		}
		row[0] += " " + placeholder
	}
	if m, ok := f.(ucli.DocGenerationMultiValueFlag); ok && m.IsMultiValueFlag() {
		usage += "; may be repeated"
	}
	if r, ok := f.(ucli.RequiredFlag); ok && r.IsRequired() {
		usage += " (required)"
	}
	if text := defaultText(doc); text != "" {
		usage += " (default: " + text + ")"
	}
	row[1] = usage
	return row
}

// defaultText returns a flag's default. It returns "" for a zero default, because the usage text explains it.
func defaultText(f ucli.DocGenerationFlag) string {
	if text := f.GetDefaultText(); text != "" {
		return text
	}
	if !f.TakesValue() {
		return ""
	}
	text := strings.NewReplacer(`"`, "", "[", "", "]", "").Replace(f.GetValue())
	if text == "0" || text == "0s" {
		return ""
	}
	for _, zero := range []string{"m0s", "h0m"} { // prints 45m0s as 45m
		if strings.HasSuffix(text, zero) {
			text = text[:len(text)-2]
		}
	}
	return text
}

// environment returns the help text about the flags' environment variables. The example in the text is a short flag
// with a dash, because its variable shows what replaces the dash.
func environment(flags []ucli.Flag) string {
	var with, without, odd []string
	var example string
	var dash bool
	for _, f := range flags {
		name := f.Names()[0]
		doc, ok := f.(ucli.DocGenerationFlag)
		switch {
		case name == "help" || name == "version":
		case !ok || len(doc.GetEnvVars()) == 0:
			without = append(without, "--"+name)
		case doc.GetEnvVars()[0] != envName(name):
			odd = append(odd, "--"+name+" can be set by the environment variable "+doc.GetEnvVars()[0]+".")
		default:
			with = append(with, "--"+name)
			if example == "" || strings.Contains(name, "-") && (!dash || len(envName(name)) < len(example)) {
				example, dash = doc.GetEnvVars()[0], strings.Contains(name, "-")
			}
		}
	}
	var text string
	const are = " can be set by environment variables: PREBAKE_ and the flag's name, as in "
	switch {
	case len(with) == 0:
	case len(without)+len(odd) == 0:
		text = "All flags" + are + example + ". "
	case len(without)+len(odd) <= len(with):
		text = "All flags but " + list(without) + are + example + ". "
	case len(with) == 1:
		text = with[0] + " can be set by the environment variable " + example + ". "
	default:
		text = list(with) + are + example + ". "
	}
	if text += strings.Join(odd, " "); text != "" {
		text += " A flag overrides its variable."
	}
	return text
}

func list(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	return strings.Join(words[:len(words)-1], ", ") + " and " + words[len(words)-1]
}

// section writes a heading, and rows with two columns below it.
func section(b *strings.Builder, heading string, rows [][2]string) {
	fmt.Fprintf(b, "\n%s:\n", heading)
	column := 0
	for _, row := range rows {
		column = max(column, utf8.RuneCountInString(row[0])+4)
	}
	column = min(column, helpColumn)
	for _, row := range rows {
		used := utf8.RuneCountInString(row[0]) + 2
		fmt.Fprintf(b, "  %s", row[0])
		switch {
		case row[1] == "":
			b.WriteString("\n")
			continue
		case used+2 > column:
			b.WriteString("\n" + strings.Repeat(" ", column))
		default:
			b.WriteString(strings.Repeat(" ", column-used))
		}
		line(b, column, row[1])
	}
}

// line writes text that begins at a column, and breaks it before column 80. Each new line begins at the same column.
func line(b *strings.Builder, column int, text string) {
	used := column
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case used+1+n > helpWidth:
			b.WriteString("\n" + strings.Repeat(" ", column))
			used = column
		default:
			b.WriteString(" ")
			used++
		}
		b.WriteString(word)
		used += n
	}
	b.WriteString("\n")
}
