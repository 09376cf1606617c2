package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/prebake/prebake/pkg/api"
	"github.com/prebake/prebake/pkg/fault"
)

// A token is prebake_ID_SECRET. Scanners for leaked secrets can recognize the prefix. ID and SECRET have 128 random
// bits each. Nobody can guess these, so a plain SHA-256 of the token in the database is safe.
const tokenPrefix = "prebake_"

// DefaultLifetime and MaxLifetime are the default and the maximum lifetime of a token.
const (
	DefaultLifetime = 90 * 24 * time.Hour
	MaxLifetime     = 2 * 365 * 24 * time.Hour
)

// usedEvery is the minimum pause between two records of a token's use. Recording takes at most recordTime. After an
// error, the next record waits for recordPause.
const (
	usedEvery   = time.Hour
	recordTime  = 2 * time.Second
	recordPause = time.Minute
)

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// NewToken makes a token and its hash. Only the token's field Secret contains the secret.
func NewToken(n api.NewToken, by string, now time.Time) (api.Token, []byte, error) {
	fail := func(text, hint string) (api.Token, []byte, error) {
		return api.Token{}, nil, fault.New(fault.Usage, "make a token: "+text, hint)
	}
	if !namePattern.MatchString(n.Name) {
		return fail(
			fmt.Sprintf("name %.80q: want letters a-z, digits and . _ -", n.Name),
			"give the token the name of its holder, such as node-pool-a",
		)
	}
	scopes, err := parseScopes(n.Scopes)
	if err != nil {
		return api.Token{}, nil, fmt.Errorf("make a token: %w", err)
	}
	life := DefaultLifetime
	if n.LifeSeconds != 0 {
		life = time.Duration(n.LifeSeconds) * time.Second
	}
	if n.LifeSeconds < 0 || n.LifeSeconds > int64(MaxLifetime/time.Second) {
		return fail(fmt.Sprintf("a lifetime of %d s is not between 1 s and %s", n.LifeSeconds, MaxLifetime), "")
	}
	t := api.Token{ID: strings.ToLower(rand.Text()), Name: n.Name, CreatedAt: now, CreatedBy: by, ExpiresAt: now.Add(life)}
	for _, s := range scopes {
		t.Scopes = append(t.Scopes, string(s))
	}
	t.Secret = tokenPrefix + t.ID + "_" + rand.Text()
	hash := sha256.Sum256([]byte(t.Secret))
	return t, hash[:], nil
}

// ofToken returns the caller of a token that an administrator made.
func (a *Authenticator) ofToken(ctx context.Context, secret string) (Principal, error) {
	id, _, _ := strings.Cut(strings.TrimPrefix(secret, tokenPrefix), "_")
	t, hash, err := a.Tokens.Token(ctx, id)
	if fault.Is(err, fault.NotFound) {
		return Principal{}, unknown("the token is not known")
	}
	if err != nil {
		return Principal{}, fmt.Errorf("look up the token: %w", err)
	}
	given := sha256.Sum256([]byte(secret))
	if subtle.ConstantTimeCompare(given[:], hash) != 1 {
		return Principal{}, unknown("the token is not known")
	}
	now := a.Now()
	switch {
	case t.RevokedAt != nil:
		return Principal{}, unknown("token " + t.Name + " was revoked")
	case !now.Before(t.ExpiresAt):
		return Principal{}, unknown("token " + t.Name + " expired on " + t.ExpiresAt.UTC().Format(time.DateOnly))
	}
	scopes, err := parseScopes(t.Scopes)
	if err != nil {
		return Principal{}, unknown("token " + t.Name + " has a scope that this version of the server does not know")
	}
	if t.UsedAt == nil || now.Sub(*t.UsedAt) >= usedEvery {
		a.recordUse(ctx, t, now)
	}
	return Principal{Name: "token:" + t.Name, Scopes: scopes}, nil
}

// recordUse records the use of a token. After an error of the database, the caller is still accepted: a server with a
// full disk must still serve nodes. After an error, recordUse does nothing for recordPause, so that callers do not all
// wait for the database.
func (a *Authenticator) recordUse(ctx context.Context, t api.Token, now time.Time) {
	if now.UnixNano() < a.noRecordUntil.Load() {
		return
	}
	limited, cancel := context.WithTimeout(ctx, recordTime)
	defer cancel()
	if err := a.Tokens.TokenUsed(limited, t.ID, now); err != nil && ctx.Err() == nil {
		a.noRecordUntil.Store(now.Add(recordPause).UnixNano())
		a.Log.WarnContext(ctx, "token use not recorded", "name", t.Name, "err", err)
	}
}
