-- Since when an artifact is yanked or in quarantine; 0 is not, or nobody wrote it down.
ALTER TABLE artifacts ADD COLUMN withdrawn_at BIGINT NOT NULL DEFAULT 0;
