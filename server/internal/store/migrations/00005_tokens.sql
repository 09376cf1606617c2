-- The tokens of callers, and the audit log.

CREATE TABLE tokens (
    id         TEXT   NOT NULL PRIMARY KEY,
    name       TEXT   NOT NULL,
    hash       TEXT   NOT NULL,
    scopes     TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    created_by TEXT   NOT NULL,
    expires_at BIGINT NOT NULL,
    used_at    BIGINT NOT NULL DEFAULT 0,
    revoked_at BIGINT NOT NULL DEFAULT 0
);

CREATE TABLE audit (
    id      {{id}},
    at      BIGINT NOT NULL,
    actor   TEXT   NOT NULL,
    method  TEXT   NOT NULL,
    path    TEXT   NOT NULL,
    status  BIGINT NOT NULL,
    request TEXT   NOT NULL,
    source  TEXT   NOT NULL
);

CREATE INDEX audit_by_time ON audit (at);
