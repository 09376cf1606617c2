-- tries numbers the builds of a cell since the last one that was published or
-- that somebody requested. The builds that exist get the numbers of the rule
-- before: since the last published build.

ALTER TABLE builds ADD COLUMN tries BIGINT NOT NULL DEFAULT 1;
WITH numbered AS (
    SELECT id, state, build_id, board, driver, flavour,
        SUM(CASE WHEN state = 'published' THEN 1 ELSE 0 END)
            OVER (PARTITION BY build_id, board, driver, flavour ORDER BY id) AS successes FROM builds
), failures AS (
    SELECT id, ROW_NUMBER()
        OVER (PARTITION BY build_id, board, driver, flavour, successes ORDER BY id) AS tries
    FROM numbered WHERE state = 'failed'
)
UPDATE builds SET tries = failures.tries FROM failures WHERE failures.id = builds.id;
