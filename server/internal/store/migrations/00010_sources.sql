-- What COS's lists say of each type of GPU, and which GKE versions boot a kernel.

ALTER TABLE kernels ADD COLUMN gpus TEXT NOT NULL DEFAULT '{}';
ALTER TABLE kernels ADD COLUMN gke TEXT NOT NULL DEFAULT '[]';
