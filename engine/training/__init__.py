"""Steps, schedule, checkpoints and the log of a training run."""
