"""What trains and evaluates: processes, samples, schedule, checkpoints, inference, metrics."""
