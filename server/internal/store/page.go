package store

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Page limits a list and says where it continues.
type Page struct {
	// After is the cursor that the previous page returned; "" starts the list.
	After string
	// Limit is the most entries. The caller makes sure that it is at least 1.
	Limit int
}

// maxCursor is the most bytes of a cursor. Cursors of this package have some hundred bytes.
const maxCursor = 1 << 10

// cursor encodes the sort key of an entry. Clients send the cursor back without reading it.
func cursor(key ...string) string {
	raw, _ := json.Marshal(key) // encoding strings never fails
	return base64.RawURLEncoding.EncodeToString(raw)
}

// parse returns the n fields of the cursor, or nil at the start of the list.
func (p Page) parse(n int) ([]string, error) {
	if p.After == "" {
		return nil, nil
	}
	var key []string
	raw, err := base64.RawURLEncoding.DecodeString(p.After[:min(len(p.After), maxCursor)])
	if err == nil {
		err = json.Unmarshal(raw, &key)
	}
	if err != nil || len(key) != n || len(p.After) > maxCursor {
		return nil, fault.New(
			fault.Usage,
			"the cursor is not from this list",
			"take the cursor from the Link header of the previous page",
		)
	}
	return key, nil
}

// cut takes limit+1 entries and returns the first limit of them. It also returns the cursor of the next page, or ""
// if there is none.
func cut[T any](all []T, limit int, key func(T) []string) ([]T, string) {
	if len(all) <= limit {
		return all, ""
	}
	all = all[:limit]
	return all, cursor(key(all[limit-1])...)
}

// where collects the conditions of a query. Each ? of a condition becomes the next numbered parameter, so both
// databases get the same text.
type where struct {
	conditions []string
	args       []any
}

func (w *where) and(condition string, args ...any) {
	for _, a := range args {
		w.args = append(w.args, a)
		condition = strings.Replace(condition, "?", fmt.Sprintf("$%d", len(w.args)), 1)
	}
	w.conditions = append(w.conditions, condition)
}

// equal adds a condition, unless the value is the zero value, which means any.
func equal[T comparable](w *where, column string, value T) {
	var zero T
	if value != zero {
		w.and(column+" = ?", value)
	}
}

func (w *where) String() string {
	if len(w.conditions) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(w.conditions, " AND ")
}

// limit adds a LIMIT of n+1 entries. The additional entry shows that another page follows.
func (w *where) limit(n int) string {
	w.args = append(w.args, n+1)
	return fmt.Sprintf(" LIMIT $%d", len(w.args))
}
