package cli

import (
	"strings"

	ucli "github.com/urfave/cli/v3"
)

// Examples adds examples to commands. The keys are the commands' paths, such as "tokens create". The text is what a
// user types, without the program's name; each line is one example.
func Examples(root *ucli.Command, examples map[string]string) *ucli.Command {
	for path, text := range examples {
		cmd := root
		for name := range strings.FieldsSeq(path) {
			if cmd = cmd.Command(name); cmd == nil {
				panic("example of " + path + ", which " + root.Name + " does not have")
			}
		}
		lines := strings.ReplaceAll("\n"+text, "\n", "\n  "+root.Name+" ")
		cmd.Description = strings.TrimLeft(cmd.Description+"\n\nExample:"+lines, "\n")
	}
	return root
}
