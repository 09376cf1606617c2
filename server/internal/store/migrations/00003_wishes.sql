-- The wish lists, the priorities of builds, and an index for the times at which
-- cells became ready.

CREATE TABLE wish_lists (
    name       TEXT   NOT NULL PRIMARY KEY,
    text       TEXT   NOT NULL,
    version    BIGINT NOT NULL,
    changed_at BIGINT NOT NULL,
    planned_at BIGINT NOT NULL DEFAULT 0,
    cells      BIGINT NOT NULL DEFAULT 0,
    problems   TEXT   NOT NULL DEFAULT '[]'
);

-- Builds with priority 1 start first; see package queue.
ALTER TABLE builds ADD COLUMN priority BIGINT NOT NULL DEFAULT 1;

CREATE INDEX artifact_kernels_by_time ON artifact_kernels (attested_at);
