package store

import (
	"context"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

const tokenColumns = `id, name, scopes, created_at, created_by, expires_at, used_at, revoked_at, hash`

func scanToken(row func(...any) error) (t api.Token, hash []byte, err error) {
	var scopes, sum string
	var created, expires, used, revoked int64
	if err := row(&t.ID, &t.Name, &scopes, &created, &t.CreatedBy, &expires, &used, &revoked, &sum); err != nil {
		return t, nil, err
	}
	t.CreatedAt, t.ExpiresAt, t.UsedAt, t.RevokedAt = timeOf(created), timeOf(expires), timePtr(used), timePtr(revoked)
	hash, err = hex.DecodeString(sum)
	return t, hash, errors.Join(err, json.Unmarshal([]byte(scopes), &t.Scopes))
}

// Token reads a token and its hash. If the token does not exist, the error has kind NotFound.
func (s *Store) Token(ctx context.Context, id string) (api.Token, []byte, error) {
	t, hash, err := scanToken(s.readers.QueryRowContext(ctx, `SELECT `+tokenColumns+` FROM tokens WHERE id = $1`, id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return t, nil, noToken(id)
	}
	return t, hash, classify("read token", err)
}

func noToken(id string) error {
	return fault.New(fault.NotFound, fmt.Sprintf("token %.40q does not exist", id),
		"take the id from the list of tokens: server tokens list")
}

// Tokens lists all tokens without their secrets, sorted by name.
func (s *Store) Tokens(ctx context.Context) ([]api.Token, error) {
	all := []api.Token{}
	err := query(ctx, s.readers, func(row func(...any) error) error {
		t, _, err := scanToken(row)
		all = append(all, t)
		return err
	}, `SELECT `+tokenColumns+` FROM tokens ORDER BY name, created_at, id`)
	return all, classify("list the tokens", err)
}

// CreateToken stores a token and its hash, but not the secret.
func (s *Store) CreateToken(ctx context.Context, t api.Token, hash []byte) error {
	scopes, err := json.Marshal(t.Scopes)
	if err != nil {
		return fmt.Errorf("encode scopes of token %s: %w", t.Name, err)
	}
	return s.Write(ctx, func(tx *Tx) error {
		_, err := tx.ExecContext(ctx,
			`INSERT INTO tokens (id, name, hash, scopes, created_at, created_by, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7)`,
			t.ID, t.Name, hex.EncodeToString(hash), string(scopes), micros(t.CreatedAt), t.CreatedBy, micros(t.ExpiresAt))
		return classify("store the token "+t.Name, err)
	})
}

// RevokeToken makes a token invalid. The row stays, because the audit log refers to it. A second call does not change
// the time.
func (s *Store) RevokeToken(ctx context.Context, id string, at time.Time) error {
	return s.Write(ctx, func(tx *Tx) error {
		done, err := tx.ExecContext(ctx,
			`UPDATE tokens SET revoked_at = CASE revoked_at WHEN 0 THEN CAST($2 AS BIGINT) ELSE revoked_at END WHERE id = $1`,
			id, micros(at))
		if err != nil {
			return classify("revoke token", err)
		}
		if n, err := done.RowsAffected(); err == nil && n == 0 {
			return noToken(id)
		}
		return nil
	})
}

// TokenUsed records when a token was used.
func (s *Store) TokenUsed(ctx context.Context, id string, at time.Time) error {
	return s.Write(ctx, func(tx *Tx) error {
		_, err := tx.ExecContext(ctx, `UPDATE tokens SET used_at = $2 WHERE id = $1`, id, micros(at))
		return classify("record the use of a token", err)
	})
}

// Audited adds an entry to the audit log.
func (s *Store) Audited(ctx context.Context, e api.AuditEntry) error {
	return s.Write(ctx, func(tx *Tx) error {
		_, err := tx.ExecContext(ctx,
			`INSERT INTO audit (at, actor, method, path, status, request, source) VALUES ($1, $2, $3, $4, $5, $6, $7)`,
			micros(e.At), e.Actor, e.Method, e.Path, e.Status, e.Request, e.Source)
		return classify("add to audit log", err)
	})
}

// Audit lists a page of the audit log, newest first. An empty actor means all.
func (s *Store) Audit(ctx context.Context, actor string, p Page) (all []api.AuditEntry, next string, err error) {
	after, err := p.parse(1)
	if err != nil {
		return nil, "", err
	}
	w := &where{}
	addEqual(w, "actor", actor)
	if after != nil {
		w.and("id < CAST(? AS BIGINT)", after[0])
	}
	all = []api.AuditEntry{}
	var ids []int64
	err = query(ctx, s.readers, func(row func(...any) error) error {
		var e api.AuditEntry
		var id, at int64
		err := row(&id, &at, &e.Actor, &e.Method, &e.Path, &e.Status, &e.Request, &e.Source)
		e.At = timeOf(at)
		all, ids = append(all, e), append(ids, id)
		return err
	}, `SELECT id, at, actor, method, path, status, request, source FROM audit`+w.String()+` ORDER BY id DESC`+
		w.limit(p.Limit), w.args...)
	if err != nil {
		return nil, "", classify("read audit log", err)
	}
	if len(all) > p.Limit {
		all, next = all[:p.Limit], cursor(strconv.FormatInt(ids[p.Limit-1], 10))
	}
	return all, next, nil
}

// TrimAudit removes all entries of the audit log that are older than the given time.
func (s *Store) TrimAudit(ctx context.Context, before time.Time) error {
	return s.Write(ctx, func(tx *Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM audit WHERE at < $1`, micros(before))
		return classify("trim audit log", err)
	})
}
