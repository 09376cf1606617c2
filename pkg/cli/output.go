package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	ucli "github.com/urfave/cli/v3"
	"go.yaml.in/yaml/v3"
)

// formats are the possible values of --output.
var formats = [...]string{"text", "json", "yaml"}

// OutputFlag returns --output text|json|yaml, for commands that only read.
func OutputFlag() ucli.Flag {
	return &ucli.StringFlag{
		Name: "output", Aliases: []string{"o"}, Value: "text", Usage: "`FORMAT` of the result: text, json or yaml",
		Validator: func(s string) error {
			if !slices.Contains(formats[:], s) {
				return fmt.Errorf("output %q: want text, json or yaml", s)
			}
			return nil
		},
	}
}

// Print writes a result to stdout in the format of --output: indented JSON, YAML, or what the callback writes.
func Print(cmd *ucli.Command, v any, text func(io.Writer) error) error {
	w := cmd.Root().Writer
	switch cmd.String("output") {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	case "yaml":
		return writeYAML(w, v)
	}
	return text(w)
}

// PrintOne writes one of several results in the format of --output: a line of JSON, a YAML document, or what the
// callback writes.
func PrintOne(cmd *ucli.Command, v any, text func(io.Writer) error) error {
	w := cmd.Root().Writer
	switch cmd.String("output") {
	case "json":
		return json.NewEncoder(w).Encode(v)
	case "yaml":
		if _, err := io.WriteString(w, "---\n"); err != nil {
			return err
		}
		return writeYAML(w, v)
	}
	return text(w)
}

// writeYAML writes a value as YAML with the keys of its JSON form, in the same order.
func writeYAML(w io.Writer, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	node, err := yamlNode(dec)
	if err != nil {
		return err
	}
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(node); err != nil {
		return err
	}
	return enc.Close()
}

// yamlNode reads the next JSON value and returns it as a YAML node.
func yamlNode(dec *json.Decoder) (*yaml.Node, error) {
	token, err := dec.Token()
	if err != nil {
		return nil, err
	}
	node := &yaml.Node{}
	switch t := token.(type) {
	case json.Delim:
		node.Kind, node.Tag = yaml.SequenceNode, "!!seq"
		if t == '{' {
			node.Kind, node.Tag = yaml.MappingNode, "!!map"
		}
		for dec.More() { // in a mapping, keys and values alternate; a key is read like a value
			entry, err := yamlNode(dec)
			if err != nil {
				return nil, err
			}
			node.Content = append(node.Content, entry)
		}
		if len(node.Content) == 0 {
			node.Style = yaml.FlowStyle // an empty list or mapping has only the forms [] and {}
		}
		_, err := dec.Token() // the closing bracket
		return node, err
	case json.Number:
		node.Kind, node.Tag, node.Value = yaml.ScalarNode, "!!int", t.String()
		if strings.ContainsAny(node.Value, ".eE") {
			node.Tag = "!!float"
		}
		return node, nil
	}
	return node, node.Encode(token)
}
