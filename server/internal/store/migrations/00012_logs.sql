-- When the server removed the build's log to save space. 0 means that it has not.
ALTER TABLE builds ADD COLUMN log_removed_at BIGINT NOT NULL DEFAULT 0;
