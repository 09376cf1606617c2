package cas

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
)

// Key is the name of a tree or a fact, put together from everything that decides
// its content. Two keys are equal only if the same parts were added in the same
// order.
type Key struct {
	parts []Part
}

// Part is one of the things that decide an entry.
type Part struct{ Name, Value string }

// NewKey begins a key for one kind of entry.
func NewKey(kind string) *Key { return (&Key{}).Add("kind", kind) }

// Add adds a part and returns the key.
func (k *Key) Add(name, value string) *Key {
	k.parts = append(k.parts, Part{name, value})
	return k
}

// With returns a key with one part more, and leaves this one as it is.
func (k *Key) With(name, value string) *Key {
	return (&Key{slices.Clone(k.parts)}).Add(name, value)
}

// String is the key as the cache takes it: SHA-256 in hex.
func (k *Key) String() string {
	h := sha256.New()
	for _, p := range k.parts {
		fmt.Fprintf(h, "%d:%s %d:%s\n", len(p.Name), p.Name, len(p.Value), p.Value)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Differs names the first part in which two keys differ, or "" where there is
// none: why an entry was not found, when another one was.
func (k *Key) Differs(other *Key) string {
	for i, p := range k.parts {
		if i >= len(other.parts) || other.parts[i] != p {
			return p.Name
		}
	}
	if len(other.parts) > len(k.parts) {
		return other.parts[len(k.parts)].Name
	}
	return ""
}

// keyKind is the kind of the facts that [Cache.Used] remembers.
const keyKind = "keys"

// MissReason says why an entry has to be made: the name of the first part in which
// its key differs from the one that was used about the same thing the last time. It
// is "" the first time, and where the entry was there and is gone.
func (c *Cache) MissReason(about string, key *Key) string {
	raw, ok := c.Fact(keyKind, about)
	var last Key
	if !ok || json.Unmarshal(raw, &last.parts) != nil {
		return ""
	}
	return key.Differs(&last)
}

// Used stores the key of an entry that was made or found. That a full disk does
// not let it costs a reason only, and what asks for room says so by itself.
func (c *Cache) Used(about string, key *Key) {
	if raw, err := json.Marshal(key.parts); err == nil {
		_ = c.PutFact(keyKind, about, raw)
	}
}
