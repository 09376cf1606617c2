package host

import (
	"strings"
	"unicode"
)

// ParseKeyValues parses KEY=VALUE lines, as COS writes them in os-release and lsb-release. The first '=' separates key
// and value. White space and quotes of both kinds around the value are removed. Blank lines, comments and lines without
// '=' are skipped. If a key has several lines, the last one counts.
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
