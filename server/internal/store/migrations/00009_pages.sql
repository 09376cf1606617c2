-- When an artifact was yanked or put into quarantine. 0 means that it is neither,
-- or that the time is not known.
ALTER TABLE artifacts ADD COLUMN withdrawn_at BIGINT NOT NULL DEFAULT 0;

-- Indexes for the filters of kernels by milestone and by the state of their builds.
CREATE INDEX kernels_by_milestone ON kernels (milestone, sort_key DESC, board);
CREATE INDEX builds_by_kernel_state ON builds (build_id, board, state);
