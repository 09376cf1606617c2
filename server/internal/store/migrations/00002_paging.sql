-- Columns and indexes for lists in pages and for answers about one cell. sort_key
-- orders versions by number; target.SortKey makes it. The Go code that runs after
-- this file fills it for the rows that exist. {{sorted}} is text that the database
-- compares byte by byte.

ALTER TABLE kernels ADD COLUMN sort_key {{sorted}} NOT NULL DEFAULT '';
ALTER TABLE kernels ADD COLUMN first_seen_at BIGINT NOT NULL DEFAULT 0;
UPDATE kernels SET first_seen_at = seen_at;
-- Each kernel of a build or of an artifact gets a row of its own.
INSERT INTO kernels (build_id, board, seen_at) SELECT DISTINCT build_id, board, 0 FROM builds WHERE TRUE ON CONFLICT DO NOTHING;
INSERT INTO kernels (build_id, board, seen_at) SELECT DISTINCT build_id, board, 0 FROM artifact_kernels WHERE TRUE ON CONFLICT DO NOTHING;
CREATE INDEX kernels_by_age ON kernels (sort_key DESC, board);

ALTER TABLE drivers ADD COLUMN sort_key {{sorted}} NOT NULL DEFAULT '';
CREATE INDEX drivers_by_age ON drivers (sort_key DESC);

CREATE INDEX artifacts_by_fingerprint ON artifacts (fingerprint, driver, flavour);
CREATE INDEX artifacts_by_time ON artifacts (published_at DESC, digest);

-- When the artifact became usable for this kernel.
ALTER TABLE artifact_kernels ADD COLUMN attested_at BIGINT NOT NULL DEFAULT 0;
CREATE INDEX artifact_kernels_by_kernel ON artifact_kernels (build_id, board);

-- When a builder last reported that it works on the build.
ALTER TABLE builds ADD COLUMN beat_at BIGINT NOT NULL DEFAULT 0;
CREATE INDEX builds_by_state ON builds (state, id);
