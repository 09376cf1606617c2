package store

import (
	"slices"
	"testing"
)

// FuzzCursor parses arbitrary cursors. An accepted cursor must have all fields, and must stay the same when its fields
// are encoded and parsed again.
func FuzzCursor(f *testing.F) {
	for _, seed := range []string{"", "x", cursor(), cursor("1"), cursor("2026-11-01", "a/b"), "bnVsbA", "W251bGxd"} {
		f.Add(seed, 2)
	}
	f.Fuzz(func(t *testing.T, after string, n int) {
		n = int(uint(n) % 5)
		key, err := Page{After: after}.parse(n)
		if err != nil || after == "" {
			return
		}
		if len(key) != n {
			t.Fatalf("parse(%q, %d) = %q; want %d fields", after, n, key, n)
		}
		again, err := Page{After: cursor(key...)}.parse(n)
		if len(after) < maxCursor/8 && (err != nil || !slices.Equal(again, key)) {
			t.Errorf("parse(cursor(%q)) = %q, %v; want the same", key, again, err)
		}
	})
}
