"""Heads that map the features of a backbone to class scores."""

from networks.heads.rcca import RCCAHead

__all__ = ["RCCAHead"]
