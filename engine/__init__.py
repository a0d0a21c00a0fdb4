"""Training and evaluation: processes, data loading, schedule, checkpoints, inference and metrics."""
