"""The integer ops. Importing this package imports every op file beside it; `Op.registry` then lists them all."""

from __future__ import annotations

import importlib
import pkgutil

from quantlib.ops._base import Op
from quantlib.ops.add import Add
from quantlib.ops.affine_join import AffineJoin
from quantlib.ops.concat import Concat
from quantlib.ops.conv2d import Conv2d
from quantlib.ops.dense import Dense
from quantlib.ops.fractional_conv2d import FixedMerge, FractionalConv2d
from quantlib.ops.input import Input
from quantlib.ops.join import Join
from quantlib.ops.lut import Lut
from quantlib.ops.max_pool import MaxPool
from quantlib.ops.multiply import Multiply
from quantlib.ops.pad import Pad
from quantlib.ops.rearrange import Rearrange
from quantlib.ops.requant import Requant
from quantlib.ops.reshape import Reshape
from quantlib.ops.saturating_dense import SaturatingDense
from quantlib.ops.select import Select
from quantlib.ops.shift import Shift
from quantlib.ops.slice2d import Slice2d
from quantlib.ops.sum_pool import SumPool
from quantlib.ops.thermometer import Thermometer
from quantlib.ops.threshold import Threshold

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = [
    "Add",
    "AffineJoin",
    "Concat",
    "Conv2d",
    "Dense",
    "FixedMerge",
    "FractionalConv2d",
    "Input",
    "Join",
    "Lut",
    "MaxPool",
    "Multiply",
    "Op",
    "Pad",
    "Rearrange",
    "Requant",
    "Reshape",
    "SaturatingDense",
    "Select",
    "Shift",
    "Slice2d",
    "SumPool",
    "Thermometer",
    "Threshold",
]
