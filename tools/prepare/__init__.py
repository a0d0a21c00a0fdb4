"""Preparation of labeled pictures of other programs for training (python -m tools.prepare)."""
