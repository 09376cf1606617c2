-- tries numbers the builds of a cell since the last one that was published or
-- that somebody requested. The builds that exist get the numbers of the rule
-- before: since the last published build.

ALTER TABLE builds ADD COLUMN tries BIGINT NOT NULL DEFAULT 1;
UPDATE builds SET tries = (
    SELECT COUNT(*) FROM builds f WHERE f.build_id = builds.build_id AND f.board = builds.board
    AND f.driver = builds.driver AND f.flavour = builds.flavour AND f.state = 'failed' AND f.id <= builds.id
    AND NOT EXISTS (
        SELECT 1 FROM builds s WHERE s.build_id = f.build_id AND s.board = f.board AND s.driver = f.driver
        AND s.flavour = f.flavour AND s.state = 'published' AND s.id > f.id AND s.id < builds.id
    )
) WHERE state = 'failed';
