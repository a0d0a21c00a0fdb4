"""Processes, signals, and the optional apex backend."""
