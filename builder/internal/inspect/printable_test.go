package inspect

import "testing"

// TestPrintable checks that the text of a bucket cannot control the terminal of the person who reads it.
func TestPrintable(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"CONFIG_A=\"é x\"\tb\nc": "CONFIG_A=\"é x\"\tb\nc", "\x1b[2Jgone\a\r": "\uFFFD[2Jgone\uFFFD\uFFFD",
		"a\u202eb\xff": "a\uFFFDb\uFFFD",
	} {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) = %q; want %q", text, got, want)
		}
	}
	if got := printable(string(make([]byte, 1<<20))); len([]rune(got)) > maxText+4 {
		t.Errorf("a text of 1 MiB is cut to %d runes; want about %d", len([]rune(got)), maxText)
	}
}
