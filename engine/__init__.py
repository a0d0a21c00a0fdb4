"""Training and evaluation: processes, samples, schedule, checkpoints, inference and metrics."""
