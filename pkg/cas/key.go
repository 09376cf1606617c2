package cas

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
)

// Key is the name of a tree or a fact. Two keys are equal only if the same parts were added in the same order.
type Key struct {
	parts []Part
}

// Part is one input that decides the content of an entry.
type Part struct{ Name, Value string }

// NewKey returns a key for one kind of entry.
func NewKey(kind string) *Key { return (&Key{}).Add("kind", kind) }

// Add adds a part to the key and returns the key.
func (k *Key) Add(name, value string) *Key {
	k.parts = append(k.parts, Part{name, value})
	return k
}

// With returns a copy of the key with one more part. The key itself does not change.
func (k *Key) With(name, value string) *Key {
	return (&Key{slices.Clone(k.parts)}).Add(name, value)
}

// String returns the key in the form that the cache uses: the SHA-256 of the parts, in hex.
func (k *Key) String() string {
	h := sha256.New()
	for _, p := range k.parts {
		fmt.Fprintf(h, "%d:%s %d:%s\n", len(p.Name), p.Name, len(p.Value), p.Value)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Differs returns the name of the first part in which two keys differ; "" means that they are equal.
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

// keyKind is the kind of the facts that [Cache.Used] stores.
const keyKind = "keys"

// MissReason returns the name of the first part in which a missing entry's key differs from the key that [Cache.Used]
// stored last for the same purpose. It returns "" if no key was stored, or if the keys are equal.
func (c *Cache) MissReason(purpose string, key *Key) string {
	raw, ok := c.Fact(keyKind, purpose)
	var last Key
	if !ok || json.Unmarshal(raw, &last.parts) != nil {
		return ""
	}
	return key.Differs(&last)
}

// Used stores the key of an entry that was made or found, for MissReason. The purpose says what the entry is for. Used
// ignores errors, which only make MissReason less exact.
func (c *Cache) Used(purpose string, key *Key) {
	if raw, err := json.Marshal(key.parts); err == nil {
		_ = c.PutFact(keyKind, purpose, raw)
	}
}
