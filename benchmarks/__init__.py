"""Benchmarks of the operator, the loader, the evaluation and the resume."""
