"""Heads that turn the features of a backbone into class scores."""

from networks.heads.rcca import RCCAHead

__all__ = ["RCCAHead"]
