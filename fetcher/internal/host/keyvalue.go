package host

import (
	"strings"
	"unicode"
)

// ParseKeyValues parses KEY=VALUE lines, the format of os-release and lsb-release. It removes white space and quotes
// around a value, and skips lines without '='. The last line of a key counts.
func ParseKeyValues(text string) map[string]string {
	values := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		key, value, ok := strings.Cut(line, "=")
		key = strings.TrimSpace(key)
		if !ok || key == "" || strings.HasPrefix(line, "#") {
			continue
		}
		values[key] = strings.TrimFunc(value, isPadding)
	}
	return values
}

func isPadding(r rune) bool { return r == '"' || r == '\'' || unicode.IsSpace(r) }

// FormatKeyValues writes values in the order of keys. It skips keys without a value.
func FormatKeyValues(values map[string]string, keys ...string) string {
	var b strings.Builder
	for _, key := range keys {
		if v, ok := values[key]; ok {
			b.WriteString(key + "=" + v + "\n")
		}
	}
	return b.String()
}
