package cas_test

import (
	"testing"

	"github.com/prebake/prebake/pkg/cas"
)

// TestKey checks that two keys differ even if their parts, written one after the other, are the same text. MissReason
// must name the part that differs.
func TestKey(t *testing.T) {
	t.Parallel()
	base := func() *cas.Key { return cas.NewKey("k").Add("a", "1").Add("b", "2") }
	met := map[string]string{}
	for what, k := range map[string]*cas.Key{
		"base": base(), "another kind": cas.NewKey("l").Add("a", "1").Add("b", "2"),
		"another value":      cas.NewKey("k").Add("a", "1").Add("b", "3"),
		"another order":      cas.NewKey("k").Add("b", "2").Add("a", "1"),
		"parts run together": cas.NewKey("k").Add("a", "1\n1:b 1:2"), "one more": base().With("c", ""),
	} {
		if other, ok := met[k.String()]; ok {
			t.Errorf("%s and %s have one key", what, other)
		}
		met[k.String()] = what
	}
	if one, two := base(), base(); one.String() != two.String() {
		t.Error("equal parts give two keys")
	}
	for want, other := range map[string]*cas.Key{"": base(), "b": cas.NewKey("k").Add("a", "1").Add("b", "3"),
		"c": base().With("c", "x"), "kind": cas.NewKey("l").Add("a", "1").Add("b", "2")} {
		if got := base().Differs(other); got != want {
			t.Errorf("Differs = %q; want %q", got, want)
		}
	}
	cache, err := cas.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	for i, row := range []struct {
		about string
		key   *cas.Key
		want  string
	}{
		{"x", base(), ""}, {"x", base(), ""}, {"x", cas.NewKey("k").Add("a", "1").Add("b", "3"), "b"}, {"y", base(), ""},
		{"x", base().With("c", "1"), "b"}, {"x", base(), "c"},
	} {
		if got := cache.MissReason(row.about, row.key); got != row.want {
			t.Errorf("%d: MissReason(%s) = %q; want %q", i, row.about, got, row.want)
		}
		cache.Used(row.about, row.key)
	}
	b := base()
	if b.With("c", "1"); b.String() != base().String() {
		t.Error("With changes the key")
	}
}
