-- Which wanted cells are of early-warning entries, whose failures alarm nobody.

ALTER TABLE wanted ADD COLUMN early BIGINT NOT NULL DEFAULT 0;
CREATE INDEX wanted_by_cell ON wanted (build_id, board, driver, flavour, early);
