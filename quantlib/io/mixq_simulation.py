"""Runs the integers that DeepBurning-MixQ's exporter writes, and counts where they and ours differ from the fake-quantized model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantlib as ql
from quantlib import evaluator
from quantlib.io.mixq_export import IntegerNetwork, Layer, MixqExportError, extract, requantized
from quantlib.layers import DorefaActivation, HalfWave, SpaceToDepth

Mode = Literal["upstream", "corrected"]
EXACT = 1 << 53  # of float64, in which the convolutions run


@dataclass(frozen=True, eq=False)
class Simulation:
    """inputs: the integers that enter each layer, behind pools and joins; outputs: those that leave it, before the pool behind it; all
    int64 (N, C, H, W), the linear layer's output (N, classes). output: real, float32, as the model's."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    output: Tensor


def simulate(network: IntegerNetwork, images: Tensor, mode: Mode = "upstream") -> Simulation:
    """The published model-level simulation, integers only until the last division.

    images: uint8 (N, 3, H, W), of the size that `extract` was given. A first layer of fewer than 8 bits takes the leading ones. Pools work
    on quantized values. mode matters where a branch joins: "upstream" takes the branch from the codes of the next layer, rounds them to the
    joining layer's step in float32 and does not limit them, as published; "corrected" quantizes the branch from its own accumulator.
    MixqExportError for another size; OverflowError where an accumulator could leave 53 bits.
    """
    if mode not in ("upstream", "corrected"):
        raise ValueError(f'mode is "upstream" or "corrected", got {mode!r}')
    first, branch = network.layers[0], network.branch
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (first.ich, first.irow, first.icol):
        wanted = f"uint8 (N, {first.ich}, {first.irow}, {first.icol})"
        raise MixqExportError(f"the integers were made for images {wanted}, got {images.dtype} {tuple(images.shape)}")
    x = images.to(torch.int64) >> (8 - first.abit)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    side = x
    for layer in network.layers:
        if x.dim() == 4 and x.shape[-1] > layer.icol:
            x = F.max_pool2d(x.double(), 2).to(torch.int64)
        if branch is not None and layer.n == branch[1]:
            x = torch.cat([side, x], 1)
        inputs.append(x)
        acc = _accumulate(layer, x)
        x = acc if layer.inc is None else _requantize(layer, acc)
        if branch is not None and layer.n == branch[0] - 1:
            side = _side(layer, network.layers[branch[1]], x, acc, mode)
        outputs.append(x)
    div = network.layers[-1].div
    assert div is not None
    return Simulation(tuple(inputs), tuple(outputs), x.float() / div)


def _accumulate(layer: Layer, x: Tensor) -> Tensor:
    """The exact sums of products; in the last layer with its bias."""
    taps = int(np.abs(layer.w).reshape(len(layer.w), -1).sum(1).max())
    if taps * max(int(x.abs().max()), 1) >= EXACT:
        raise OverflowError(f"layer {layer.n}: its sums could leave 53 bits")
    w = torch.from_numpy(layer.w).double()
    if layer.type == "linear":
        acc = x.flatten(1).double() @ w.T
    else:
        acc = F.conv2d(x.double(), w, padding=layer.p, groups=layer.groups)
    acc = acc.to(torch.int64)
    if layer.inc is not None or layer.bias is None:
        return acc
    return acc + _per_channel(layer.bias, acc)


def _per_channel(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).reshape(-1, *[1] * (like.dim() - 2))


def _requantize(layer: Layer, acc: Tensor) -> Tensor:
    assert layer.inc is not None and layer.bias is not None and layer.lshift_T is not None and layer.obit is not None
    v = acc * _per_channel(layer.inc, acc) + _per_channel(layer.bias, acc) + (1 << (layer.lshift_T - 1))
    return (v >> layer.lshift_T).clamp(0, 2**layer.obit - 1)


def _side(layer: Layer, joining: Layer, x: Tensor, acc: Tensor, mode: Mode) -> Tensor:
    """The branch as codes of the layer that it enters."""
    reorg = SpaceToDepth(2)
    assert layer.ostep is not None and layer.lshift is not None
    if mode == "upstream":
        return (reorg(x).float() * layer.ostep / joining.astep).round().to(torch.int64)
    return reorg(_requantize(requantized(layer, layer.lshift, joining.abit, joining.astep), acc))


# ---------------------------------------------------------------- how far both integer networks are from the model


@dataclass(frozen=True)
class Row:
    """One activation quantizer: how many of its codes differ from those of the fake-quantized model in float32, in each integer network."""

    name: str
    codes: int
    upstream: int
    exact: int


@dataclass(frozen=True)
class Differences:
    """Differing codes by quantizer, and the largest difference of the output."""

    rows: tuple[Row, ...]
    images: int
    upstream_output: float
    exact_output: float

    def __str__(self) -> str:
        lines = [f"{'quantizer':12}  {'codes':>9}  {'upstream':>9}  {'quantlib':>9}   codes that differ from the model in float32"]
        lines += [f"{r.name:12}  {r.codes:9}  {r.upstream:9}  {r.exact:9}" for r in self.rows]
        codes, upstream, exact = (sum(getattr(r, k) for r in self.rows) for k in ("codes", "upstream", "exact"))
        lines.append(f"{'all':12}  {codes:9}  {upstream / codes:9.2e}  {exact / codes:9.2e}   on {self.images} images")
        return "\n".join(
            [*lines, f"largest difference of the output: upstream {self.upstream_output:.3g}, quantlib {self.exact_output:.3g}"]
        )


def differences(model: nn.Module, images: Tensor, mode: Mode = "upstream") -> Differences:
    """Compares both integer networks of a model, that of the published exporter and `quantlib.convert`'s, with the model itself.

    images: uint8 (N, 3, H, W). The model runs in float32, with images / 256. The codes are those of every activation quantizer but the
    image's; where a pool lies in front of a quantizer, behind it.
    """
    quantizers = [(n, m) for n, m in model.named_modules() if isinstance(m, HalfWave | DorefaActivation)]
    seen: dict[str, Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, x, y, n=n: seen.__setitem__(n, y)) for n, m in quantizers]
    was_training = model.training
    try:
        with torch.no_grad():
            output = model.eval()(images.float() / 256)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    network = extract(model, (images.shape[-2], images.shape[-1]))
    made = simulate(network, images, mode)
    graph = ql.convert(model, tuple(images.shape[1:]))
    last = {node.source: node.name for node in graph}  # the node that holds a quantizer's codes behind its pool
    codes = evaluator.execute(graph, images.to(torch.int64), [last[name] for name, _ in quantizers])
    rows = []
    for (name, _), layer, theirs in zip(quantizers, network.layers[1:], made.inputs[1:], strict=True):
        model_codes = (seen[name] / layer.astep).round().to(torch.int64).flatten(1)
        wrong = [int((model_codes != other.flatten(1)).sum()) for other in (theirs, codes[last[name]])]
        rows.append(Row(name, model_codes.numel(), *wrong))
    exact = float((ql.run(graph, images) - output).abs().max())
    return Differences(tuple(rows), len(images), float((made.output - output).abs().max()), exact)
