"""Heads that map the features of a backbone to class scores."""

from networks.heads.aspp import ASPPHead
from networks.heads.fcn import FCNHead
from networks.heads.gcn import GCNHead
from networks.heads.non_local import NonLocalHead
from networks.heads.psp import PSPHead
from networks.heads.rcca import RCCAHead
from networks.heads.rcca3d import RCCA3dHead

__all__ = ["ASPPHead", "FCNHead", "GCNHead", "NonLocalHead", "PSPHead", "RCCA3dHead", "RCCAHead"]
