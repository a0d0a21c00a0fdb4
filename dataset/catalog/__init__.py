"""The published data sets that are known by name: each module of this package declares one."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from dataset.published import DataSet

#: The data sets by the value of --dataset, which is the name of the module.
DATA_SETS: Mapping[str, DataSet] = MappingProxyType(
    {
        found.name: import_module(f"{__name__}.{found.name}").DATA_SET
        for found in pkgutil.iter_modules(__path__)
    }
)
