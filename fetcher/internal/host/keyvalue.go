package host

import (
	"strings"
	"unicode"
)

// ParseKeyValues reads a file of KEY=VALUE lines as COS writes os-release and
// lsb-release: the first '=' splits, white space and quotes of either
// kind around the value are dropped, blank lines, comments and lines without '=' are skipped. The
// last line of a key wins.
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

// FormatKeyValues writes values in the order of keys; keys without a value are
// left out.
func FormatKeyValues(values map[string]string, keys ...string) string {
	var b strings.Builder
	for _, key := range keys {
		if v, ok := values[key]; ok {
			b.WriteString(key + "=" + v + "\n")
		}
	}
	return b.String()
}
