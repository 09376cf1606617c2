-- early is 1 if only an early-warning entry of the wish list wants the cell.
-- Failures of such cells raise no alarm.

ALTER TABLE wanted ADD COLUMN early BIGINT NOT NULL DEFAULT 0;
CREATE INDEX wanted_by_cell ON wanted (build_id, board, driver, flavour, early);
