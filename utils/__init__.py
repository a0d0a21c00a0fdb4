"""Helpers for every package: arguments, errors, files, progress and timing."""
