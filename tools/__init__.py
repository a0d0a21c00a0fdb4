"""What people do with a trained network: one command a file, `python -m tools.NAME --help`."""
