-- Since when an artifact is yanked or in quarantine; 0 is not, or nobody wrote it down.
ALTER TABLE artifacts ADD COLUMN withdrawn_at BIGINT NOT NULL DEFAULT 0;

-- Kernels are filtered by milestone, and by the state of their builds.
CREATE INDEX kernels_by_milestone ON kernels (milestone, sort_key DESC, board);
CREATE INDEX builds_by_kernel_state ON builds (build_id, board, state);
