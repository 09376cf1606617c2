-- The replacements of yanked artifacts, the wanted cells of wish lists, and the
-- reports of nodes.

ALTER TABLE artifacts ADD COLUMN replacement TEXT NOT NULL DEFAULT '';
-- Reports of nodes up to this time do not count against the artifact.
ALTER TABLE artifacts ADD COLUMN judged_from BIGINT NOT NULL DEFAULT 0;
CREATE INDEX artifacts_by_state ON artifacts (state);

-- The cells that each wish list wanted when it was last planned.
CREATE TABLE wanted (
    list     TEXT NOT NULL REFERENCES wish_lists (name) ON DELETE CASCADE,
    build_id TEXT NOT NULL,
    board    TEXT NOT NULL,
    driver   TEXT NOT NULL,
    flavour  TEXT NOT NULL,
    PRIMARY KEY (list, build_id, board, driver, flavour)
);

-- The last report of each node about an artifact. source is the network that the
-- report came from: a prefix of the node's address.
CREATE TABLE reports (
    digest   TEXT   NOT NULL REFERENCES artifacts (digest) ON DELETE CASCADE,
    build_id TEXT   NOT NULL,
    board    TEXT   NOT NULL,
    node     TEXT   NOT NULL,
    source   TEXT   NOT NULL,
    outcome  TEXT   NOT NULL,
    class    TEXT   NOT NULL DEFAULT '',
    message  TEXT   NOT NULL DEFAULT '',
    at       BIGINT NOT NULL,
    PRIMARY KEY (digest, node)
);

CREATE INDEX reports_by_source ON reports (digest, source);
CREATE INDEX reports_by_kernel ON reports (build_id, board);
CREATE INDEX reports_by_time ON reports (at);
