"""Training losses."""

from loss.criterion import CriterionDSN, CriterionOhemDSN
from loss.ohem import OhemCrossEntropy2d

__all__ = ["CriterionDSN", "CriterionOhemDSN", "OhemCrossEntropy2d"]
