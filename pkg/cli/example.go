package cli

import (
	"strings"

	ucli "github.com/urfave/cli/v3"
)

// Examples adds examples to commands. A key is a command's path, such as "tokens create". Each line of the text is one
// example, without the program's name.
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
