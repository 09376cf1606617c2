-- The same text serves SQLite and PostgreSQL. {{id}} becomes the syntax by which
-- each database numbers rows. Times are microseconds since 1970; lists and maps
-- are JSON text.

CREATE TABLE kernels (
    build_id       TEXT   NOT NULL,
    board          TEXT   NOT NULL,
    milestone      BIGINT NOT NULL DEFAULT 0,
    commit_id      TEXT   NOT NULL DEFAULT '',
    release        TEXT   NOT NULL DEFAULT '',
    version        TEXT   NOT NULL DEFAULT '',
    arch           TEXT   NOT NULL DEFAULT '',
    fingerprint    TEXT   NOT NULL DEFAULT '',
    default_driver TEXT   NOT NULL DEFAULT '',
    latest_driver  TEXT   NOT NULL DEFAULT '',
    branches       TEXT   NOT NULL DEFAULT '{}',
    seen_at        BIGINT NOT NULL,
    PRIMARY KEY (build_id, board)
);

CREATE TABLE drivers (
    version  TEXT   NOT NULL PRIMARY KEY,
    flavours TEXT   NOT NULL DEFAULT '[]',
    seen_at  BIGINT NOT NULL
);

CREATE TABLE artifacts (
    digest       TEXT   NOT NULL PRIMARY KEY,
    repository   TEXT   NOT NULL,
    fingerprint  TEXT   NOT NULL,
    driver       TEXT   NOT NULL,
    flavour      TEXT   NOT NULL,
    arch         TEXT   NOT NULL,
    release      TEXT   NOT NULL,
    state        TEXT   NOT NULL,
    reason       TEXT   NOT NULL DEFAULT '',
    published_at BIGINT NOT NULL
);

CREATE INDEX artifacts_by_driver ON artifacts (driver, flavour);

-- The COS builds that an artifact is attested for.
CREATE TABLE artifact_kernels (
    digest   TEXT NOT NULL REFERENCES artifacts (digest) ON DELETE CASCADE,
    build_id TEXT NOT NULL,
    board    TEXT NOT NULL,
    kernel   TEXT NOT NULL,
    PRIMARY KEY (digest, build_id, board)
);

CREATE TABLE builds (
    id          {{id}},
    build_id    TEXT   NOT NULL,
    board       TEXT   NOT NULL,
    kernel      TEXT   NOT NULL,
    driver      TEXT   NOT NULL,
    flavour     TEXT   NOT NULL,
    state       TEXT   NOT NULL,
    phase       TEXT   NOT NULL DEFAULT '',
    worker      TEXT   NOT NULL DEFAULT '',
    attempt     BIGINT NOT NULL DEFAULT 0,
    class       TEXT   NOT NULL DEFAULT '',
    error       TEXT   NOT NULL DEFAULT '',
    hint        TEXT   NOT NULL DEFAULT '',
    digest      TEXT   NOT NULL DEFAULT '',
    phases      TEXT   NOT NULL DEFAULT '[]',
    created_at  BIGINT NOT NULL,
    started_at  BIGINT NOT NULL DEFAULT 0,
    finished_at BIGINT NOT NULL DEFAULT 0
);

CREATE INDEX builds_by_cell ON builds (build_id, board, driver, flavour, id);

-- Each cell has at most one open build, so a second request adds no second build.
CREATE UNIQUE INDEX builds_one_open ON builds (build_id, board, driver, flavour)
    WHERE state IN ('queued', 'building');
