"""Cityscapes, and other data sets in its layout or given by lists."""

from dataset.cityscapes import IMG_MEAN, CSDataSet
from utils.errors import DataError

__all__ = ["IMG_MEAN", "CSDataSet", "DataError"]
