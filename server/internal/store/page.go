package store

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/prebake/prebake/pkg/fault"
)

// Page says which part of a list to return.
type Page struct {
	// After is the cursor from the former page; "" means the first page.
	After string
	// Limit is the maximum number of entries of the page. It must be at least 1.
	Limit int
}

// maxCursor is the maximum length of a cursor, in bytes. Our cursors have some hundred.
const maxCursor = 1 << 10

// cursor returns the cursor of the page after an entry: the entry's encoded sort key.
func cursor(key ...string) string {
	raw, _ := json.Marshal(key) // encoding strings never fails
	return base64.RawURLEncoding.EncodeToString(raw)
}

// parse returns the fields of the cursor, or nil for the first page.
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
			"take the cursor from the Link header of the former page of the same list",
		)
	}
	return key, nil
}

// cut returns at most limit entries, and the cursor of the next page. The cursor is "" if there is no next page.
func cut[T any](all []T, limit int, key func(T) []string) ([]T, string) {
	if len(all) <= limit {
		return all, ""
	}
	all = all[:limit]
	return all, cursor(key(all[limit-1])...)
}

// where holds the conditions of a query and their arguments. Each ? becomes a numbered parameter, which both databases
// understand.
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

// addEqual adds the condition that a column has a value. It adds nothing for the zero value.
func addEqual[T comparable](w *where, column string, value T) {
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

// limit returns a LIMIT of n+1 entries. The extra entry shows that there is a next page.
func (w *where) limit(n int) string {
	w.args = append(w.args, n+1)
	return fmt.Sprintf(" LIMIT $%d", len(w.args))
}
