-- counted is 1 for the builds that the metrics count as failures: of each cell, and of
-- each class since the cell's last success, one build. The Go code that runs after this
-- file sets it for the builds that exist.

ALTER TABLE builds ADD COLUMN counted BIGINT NOT NULL DEFAULT 0;
CREATE INDEX builds_counted ON builds (class, priority, build_id, board, driver, flavour) WHERE counted = 1;
