"""The published names of the weights of the FuSeConv networks: for each of our modules, what the authors call it in each kind of block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.layers import FuSeConv2d
from zoo._fuse_blocks import Bottleneck, Separable

Pair = tuple[str, tuple[str, ...]]  # our module, the published modules whose tensors it holds one after the other
SLOTS = ("widen.0", "widen.1", "spatial", "spatial_norm", "squeeze.reduce", "squeeze.expand", "project", "project_norm")
# family -> names of the slots in a block with a depthwise convolution, with and without a 1x1 convolution in front
DEPTHWISE = {
    "mobilenet_v1": ("", "", "conv1", "bn1", "", "", "conv2", "bn2"),
    "mobilenet_v2": ("conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", "", "", "conv.2", "conv.3"),
    "mnasnet_b1": ("conv.0", "conv.1", "conv.3", "conv.4", "", "", "conv.6", "conv.7"),
    "mobilenet_v3": ("conv.0", "conv.1", "conv.3", "conv.4", "conv.5.fc.0", "conv.5.fc.2", "conv.7", "conv.8"),
}
FIRST = {
    "mobilenet_v2": ("", "", "conv.0.0", "conv.0.1", "", "", "conv.1", "conv.2"),
    "mnasnet_b1": ("", "", "0", "1", "", "", "3", "4"),
}
# in a FuSe block; the 1-D convolutions and their norms end in _h (rows) and _v (columns)
FUSE = {
    "mobilenet_v1": ("", "", "conv1", "bn1", "", "", "conv2", "bn2"),
    "mobilenet": ("conv1", "bn1", "conv2", "bn2", "se1.fc.0", "se1.fc.2", "conv3", "bn3"),
}


def separable(family: str, block: Separable, ours: str, theirs: str) -> Iterator[Pair]:
    """The pairs of one block, `ours` and `theirs` being its names."""
    fuse = isinstance(block.spatial, FuSeConv2d)
    if fuse:
        names = FUSE.get(family, FUSE["mobilenet"])
    else:
        names = DEPTHWISE[family] if block.widen is not None or family not in FIRST else FIRST[family]
    for slot, name in zip(SLOTS, names, strict=True):
        if fuse and slot == "spatial":
            yield f"{ours}.spatial.rows.0", (f"{theirs}.{name}_h",)
            yield f"{ours}.spatial.columns.0", (f"{theirs}.{name}_v",)
        elif fuse and slot == "spatial_norm":
            yield f"{ours}.{slot}", (f"{theirs}.{name}_h", f"{theirs}.{name}_v")
        elif name and getattr(block, slot.split(".")[0], None) is not None:
            yield f"{ours}.{slot}", (f"{theirs}.{name}",)


def bottleneck(block: Bottleneck, at: str) -> Iterator[Pair]:
    for name in ("conv1", "bn1", "conv3", "bn3", "downsample.0", "downsample.1"):
        if block.downsample is not None or not name.startswith("downsample"):
            yield f"{at}.{name}", (f"{at}.{name}",)
    if not isinstance(block.spatial, FuSeConv2d):
        yield f"{at}.spatial", (f"{at}.conv2",)
        yield f"{at}.spatial_norm", (f"{at}.bn2",)
        return
    ends = {letter: [letter * (i + 1) for i in range(block.spatial.copies)] for letter in "hv"}
    for kind, letter in (("rows", "h"), ("columns", "v")):
        for i, end in enumerate(ends[letter]):
            yield f"{at}.spatial.{kind}.{i}", (f"{at}.conv2_{end}",)
    yield f"{at}.spatial_norm", tuple(f"{at}.bn2_{end}" for end in (*ends["h"], *ends["v"]))


def translate(pairs: list[Pair], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names to ours; what no pair names keeps its name. A batch norm of two directions is the two, one after the other."""
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        by_module.setdefault(module, {})[leaf] = value
    result = dict(tensors)
    for ours, theirs in pairs:
        if ours == theirs[0] or not all(t in by_module for t in theirs):
            continue
        for leaf, value in by_module[theirs[0]].items():
            parts = [by_module[t].get(leaf, value) for t in theirs]
            for t in theirs:
                result.pop(f"{t}.{leaf}", None)
            result[f"{ours}.{leaf}"] = torch.cat(parts) if len(parts) > 1 and value.dim() else value
    return result
