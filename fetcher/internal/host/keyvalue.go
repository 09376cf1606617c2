package host

import "strings"

// ParseKeyValues reads a file of KEY=VALUE lines as COS writes os-release and
// lsb-release: the first '=' splits, quotes of either kind around the value
// are dropped, blank lines, comments and lines without '=' are skipped. The
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
		values[key] = strings.Trim(strings.TrimSpace(value), `"'`)
	}
	return values
}

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
