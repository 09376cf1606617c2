package store_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
	"github.com/prebake/prebake/server/internal/store"
)

// testTokens stores a token, reads it, records its use, and revokes it.
func testTokens(t *testing.T, s *store.Store, id string) {
	at := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	want := api.Token{ID: "id-" + id, Name: "node-pool-a", Scopes: []string{"ask", "push"}, CreatedAt: at,
		CreatedBy: "first", ExpiresAt: at.Add(time.Hour)}
	if err := s.CreateToken(t.Context(), want, []byte{1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	got, hash, err := s.Token(t.Context(), want.ID)
	if diff := cmp.Diff(want, got); diff != "" || string(hash) != "\x01\x02\x03" || err != nil {
		t.Errorf("Token() = %x, %v (-want +got):\n%s", hash, err, diff)
	}
	used, revoked := at.Add(time.Minute), at.Add(2*time.Minute)
	if err := s.TokenUsed(t.Context(), want.ID, used); err != nil {
		t.Error(err)
	}
	for _, when := range []time.Time{revoked, revoked.Add(time.Minute)} {
		if err := s.RevokeToken(t.Context(), want.ID, when); err != nil {
			t.Error(err)
		}
	}
	want.UsedAt, want.RevokedAt = &used, &revoked
	all, err := s.Tokens(t.Context())
	if diff := cmp.Diff([]api.Token{want}, all); diff != "" || err != nil {
		t.Errorf("Tokens() = %v (-want +got):\n%s", err, diff)
	}
	if _, _, err := s.Token(t.Context(), "none"); !fault.Is(err, fault.NotFound) {
		t.Errorf("Token(none) = %v; want not-found", err)
	}
	if err := s.RevokeToken(t.Context(), "none", at); !fault.Is(err, fault.NotFound) {
		t.Errorf("RevokeToken(none) = %v; want not-found", err)
	}
}

// testAudit lists the audit log page by page, newest first, for one actor and for all.
func testAudit(t *testing.T, s *store.Store, id string) {
	at := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	var want []api.AuditEntry
	for i := range 5 {
		e := api.AuditEntry{At: at.Add(time.Duration(i) * time.Second), Actor: "a-" + id, Method: "POST", Path: "/x",
			Status: 200 + i, Request: "r", Source: "127.0.0.1:1"}
		if err := s.Audited(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		want = append([]api.AuditEntry{e}, want...)
	}
	var got []api.AuditEntry
	p := store.Page{Limit: 2}
	for {
		page, next, err := s.Audit(t.Context(), "a-"+id, p)
		if err != nil || len(page) > 2 {
			t.Fatalf("Audit() = %d entries, %v", len(page), err)
		}
		got = append(got, page...)
		if p.After = next; next == "" {
			break
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Audit() in pages (-want +got):\n%s", diff)
	}
	if err := s.TrimAudit(t.Context(), at.Add(3*time.Second)); err != nil {
		t.Error(err)
	}
	if left, _, err := s.Audit(t.Context(), "a-"+id, store.Page{Limit: 9}); err != nil || len(left) != 2 {
		t.Errorf("Audit() after a trim = %d entries, %v; want 2", len(left), err)
	}
}
