"""Cityscapes and data sets of its layout."""

from dataset.cityscapes import IMG_MEAN, CSDataSet
from utils.errors import DataError

__all__ = ["IMG_MEAN", "CSDataSet", "DataError"]
