"""Steps, learning-rate schedule, checkpoints and log of a training run."""
