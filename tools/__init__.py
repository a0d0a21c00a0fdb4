"""Commands for checkpoints and runs, one in each file; see `python -m tools.NAME --help`."""
