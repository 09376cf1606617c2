-- The drivers that a COS build lists for each type of GPU, and the GKE versions
-- whose nodes boot a kernel.

ALTER TABLE kernels ADD COLUMN gpus TEXT NOT NULL DEFAULT '{}';
ALTER TABLE kernels ADD COLUMN gke TEXT NOT NULL DEFAULT '[]';
