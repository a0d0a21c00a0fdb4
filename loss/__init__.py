"""Training losses."""

from loss.category_consistent import CategoryConsistentLoss, WithConsistency
from loss.criterion import CriterionDSN, CriterionOhemDSN
from loss.ohem import OhemCrossEntropy2d

__all__ = [
    "CategoryConsistentLoss",
    "CriterionDSN",
    "CriterionOhemDSN",
    "OhemCrossEntropy2d",
    "WithConsistency",
]
