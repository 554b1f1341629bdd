"""The files of DeepBurning-MixQ's generator: config.h, weights.hpp, and model_param.npz in the place of its pickle.

    network = extract(model, (160, 320))            # the integers of each layer, as the published exporters have them
    write(network, "hls/ultranet", "config_simd_pe.txt")

This is the published arithmetic, in which batch norm and the next quantizer are one multiplication with rounded constants: it flips single
activations by one level (`quantlib.io.mixq_simulation` runs it and counts them). `quantlib.convert` is exact and needs none of this.
Source: DeepBurning-MixQ (arXiv 2308.11334), the exporters for CIFAR-10, UltraNet and SkyNet.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.layers import ConstantStepConv2d, ConstantStepLinear, DorefaActivation, DorefaConv2d, HalfWave, ImageFloor, SpaceToDepth
from quantlib.quantizers.constant_steps import HALF_WAVE_STEPS, step_codes, weight_step
from quantlib.quantizers.dorefa import dorefa_weight

Parallelism = Sequence[Sequence[int]] | np.ndarray | str | os.PathLike[str]
Array = np.ndarray
# (weight bits, activation bits) whose lowest weight code does not fit the packed multiplier; copied from the published exporters
CLAMPED = frozenset({(4, 2), (5, 3), (5, 4), (5, 5), (5, 6), (5, 7), (5, 8), (7, 2), (7, 3)})
LSHIFT = {"cifar": 16, "ultranet": 16, "skynet": 6}
DEFAULT_PARALLELISM: Mapping[
    str, tuple[tuple[int, ...], ...]
] = {  # rows (simd, pe), SkyNet (simd, pe, actp, pep), one for each convolution
    "cifar": ((3, 4), *((8, 8),) * 5),
    "ultranet": ((3, 16), (16, 4), (8, 8), (8, 4), *((4, 2),) * 5),
    "skynet": (
        *((3, 1, 1, 1), (3, 4, 4, 2), (3, 4, 4, 1), (8, 4, 4, 2), (1, 4, 4, 1), (8, 4, 4, 2), (3, 2, 2, 1), (8, 8, 4, 2)),
        *((3, 2, 2, 1), (16, 8, 4, 2), (1, 2, 2, 1), (16, 4, 4, 2), (8, 2, 2, 2)),
    ),
    "skynetk5": (
        *((5, 1, 1, 1), (3, 4, 4, 2), (5, 4, 4, 1), (8, 4, 4, 2), (1, 4, 4, 1), (8, 4, 4, 2), (5, 2, 2, 1), (8, 8, 4, 2)),
        *((5, 2, 2, 1), (16, 8, 4, 2), (1, 2, 2, 1), (16, 4, 4, 2), (8, 2, 2, 2)),
    ),
}  # SkyNet's were never published; these divide its channels


class MixqExportError(ValueError):
    """A model or parallelism that the published format cannot hold; the message names the layer."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One convolution (or the linear layer) in integers, before its weights are reordered. Names are those of the published files.

    k, s, p: kernel, stride, padding. irow x icol: size of its input, behind the pool before it; orow x ocol: of its output, before the
    pool behind it (max_pool). abit, astep: its input; obit, ostep: the next layer's. w (och, ich / groups, k, k) or (och, ich), real weight
    w * wstep. acc * inc + bias + 2^(lshift_T - 1), shifted right by lshift_T and limited to 0..2^obit - 1, is its output. The last layer
    has no inc and no obit; its real output is (acc + bias) / div. w_unadjusted is there where the lowest code was raised by one.
    """

    n: int
    type: str
    k: int
    s: int
    p: int
    ich: int
    och: int
    groups: int
    irow: int
    icol: int
    orow: int
    ocol: int
    abit: int
    astep: float
    actq_class: str
    wbit: int
    w: Array
    wstep: float
    w_unadjusted: Array | None = None
    convbias: Array | None = None
    bn_w: Array | None = None
    bn_b: Array | None = None
    max_pool: bool = False
    obit: int | None = None
    ostep: float | None = None
    lshift: int | None = None
    lshift_T: int | None = None
    inc_raw: Array | None = None
    bias_raw: Array | None = None
    inc: Array | None = None
    bias: Array | None = None
    incbit: int | None = None
    biasbit: int | None = None
    div: float | None = None


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """All layers in order. kind: which of the published exporters it follows. branch = (a, b): the output of layer a - 1 also enters
    layer b, as space to depth in front of the other channels."""

    kind: Literal["cifar", "ultranet", "skynet"]
    layers: tuple[Layer, ...]
    branch: tuple[int, int] | None = None


# ---------------------------------------------------------------- from a model


def bits_of(values: Array) -> int:
    """Width of a signed word for these integers, as the published exporters count it: 1 + bit length of the largest magnitude."""
    return 1 + int(np.abs(values).max(initial=0)).bit_length()


def folded(norm: nn.BatchNorm2d) -> tuple[Array, Array]:
    """Slope and offset of a batch norm, float32 in the published order: gamma / sqrt(var + eps), beta - mean / sqrt(var + eps) * gamma.

    numpy's square root is rounded correctly; that of published code may differ in the last bits, as torch's does between machines.
    """
    mean, var, gamma, beta = (
        (value if isinstance(value, Tensor) else torch.zeros(norm.num_features)).detach().float().numpy()
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    deviation = np.sqrt(var + np.float32(norm.eps))
    return gamma / deviation, beta - mean / deviation * gamma


def requantized(layer: Layer, lshift: int, obit: int, ostep: float) -> Layer:
    """The layer with its batch norm and the next quantizer as one multiplication: inc, bias and the shift.

    T = lshift + wbit + abit - 1; inc = rne(bn_w * (wstep * astep) / ostep * 2^T), bias = rne(bn_b / ostep * 2^T), in float32 (24
    significant bits) but for the product of the two steps.
    """
    assert layer.bn_w is not None and layer.bn_b is not None
    shift = lshift + layer.wbit + layer.abit - 1
    inc_raw = layer.bn_w * np.float32(layer.wstep * layer.astep) / np.float32(ostep)
    bias_raw = layer.bn_b / np.float32(ostep)
    inc, bias = (np.rint(v * np.float32(2.0**shift)).astype(np.int64) for v in (inc_raw, bias_raw))
    facts: dict[str, Any] = {"obit": obit, "ostep": ostep, "lshift": lshift, "lshift_T": shift, "inc_raw": inc_raw, "bias_raw": bias_raw}
    return replace(layer, **facts, inc=inc, bias=bias, incbit=bits_of(inc), biasbit=bits_of(bias))


def finished(layer: Layer) -> Layer:
    """The last layer: div and, where it has a bias, the bias in units of the accumulator."""
    div = 1 / (layer.wstep * layer.astep)
    if layer.convbias is None:
        return replace(layer, div=div)
    bias_raw = layer.convbias * np.float32(div)
    bias = np.rint(bias_raw).astype(np.int64)
    return replace(layer, div=div, bias_raw=bias_raw, bias=bias, biasbit=bits_of(bias))


def extract(model: nn.Module, size: tuple[int, int]) -> IntegerNetwork:
    """The integers of a quantized network of `zoo.deepburning_mixq` for images of size (height, width); the model is not changed.

    Its modules are read in order: an activation quantizer, a convolution, its norm, a pool. MixqExportError for layers that are not
    quantized or that the published format does not know.
    """
    maps = _input_maps(model, size)
    kind, layers, branch = _kind(model), list[Layer](), _branch(model)
    act: tuple[int, float, str] | None = None
    for name, module in model.named_modules():
        known = _activation(module)
        if known is not None:
            act = known
        elif isinstance(module, nn.BatchNorm2d):
            bn_w, bn_b = folded(module)
            layers[-1] = replace(layers[-1], bn_w=bn_w, bn_b=bn_b)
        elif isinstance(module, nn.MaxPool2d):
            layers[-1] = replace(layers[-1], max_pool=True)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if act is None:
                raise MixqExportError(f"{name}: no activation quantizer stands in front of it; build the network with quantizer='mixq'")
            layers.append(_layer(len(layers), name, module, act, maps[name], clamp=kind != "skynet"))
            act = None
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            raise MixqExportError(f"{name}: a layer that is not quantized has no integers; give it 1 to 8 bits")
    if not layers:
        raise MixqExportError(f"{type(model).__name__} holds no quantized convolution")
    for i, layer in enumerate(layers[:-1]):
        if layer.bn_w is None:
            raise MixqExportError(f"layer {i}: every layer but the last one has a batch norm; this one has none")
        layers[i] = requantized(layer, LSHIFT[kind], layers[i + 1].abit, layers[i + 1].astep)
    layers[-1] = finished(layers[-1])
    return IntegerNetwork(kind, tuple(layers), branch)


def _kind(model: nn.Module) -> Literal["cifar", "ultranet", "skynet"]:
    if any(isinstance(m, nn.Linear) for m in model.modules()):
        return "cifar"
    return "skynet" if any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules()) else "ultranet"


def _branch(model: nn.Module) -> tuple[int, int] | None:
    return model.branch if any(isinstance(m, SpaceToDepth) for m in model.modules()) else None  # type: ignore[return-value]


def _activation(module: nn.Module) -> tuple[int, float, str] | None:
    if isinstance(module, HalfWave):
        return module.bits, HALF_WAVE_STEPS[module.bits], "HWGQ"
    if isinstance(module, DorefaActivation):
        return module.bits, 2.0**-module.bits, "DoReFa"
    if isinstance(module, ImageFloor):
        kept = min(module.bits, 8)
        return kept, 2.0**-kept, "ImageInputQ"
    return None


def _input_maps(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shape (C, H, W) of what enters each convolution and, for the linear layer, of what was flattened for it."""
    shapes: dict[str, tuple[int, ...]] = {}
    last: list[tuple[int, ...]] = []

    def look(name: str, module: nn.Module, x: Tensor) -> None:
        if x.dim() == 4:
            last.append(tuple(x.shape[1:]))
        shapes[name] = last[-1] if isinstance(module, nn.Linear) else tuple(x.shape[1:])

    watched = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Flatten)]
    hooks = [m.register_forward_pre_hook(lambda m, x, n=n: look(n, m, x[0])) for n, m in watched]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return shapes


def _layer(n: int, name: str, module: Any, act: tuple[int, float, str], shape: tuple[int, ...], clamp: bool) -> Layer:
    w = module.weight.detach().float()
    if isinstance(module, ConstantStepConv2d | ConstantStepLinear):
        wstep = float(weight_step(w, module.bits))
        codes = step_codes(w, torch.tensor(wstep, dtype=torch.float64).to(w.dtype), module.bits)
    elif isinstance(module, DorefaConv2d):
        wstep = 2.0 ** (1 - module.bits)
        codes = dorefa_weight(w, module.bits) / wstep
    else:
        raise MixqExportError(f"{name}: {type(module).__name__} is not quantized; build the network with quantizer='mixq' or 'dorefa'")
    integers, abit = codes.to(torch.int64).numpy(), act[0]
    raised = None
    lowest = -(2 ** (module.bits - 1))
    if clamp and (module.bits, abit) in CLAMPED and (integers == lowest).any():
        raised, integers = integers, np.maximum(integers, lowest + 1)
    ich, irow, icol = shape
    facts: dict[str, Any] = {"n": n, "irow": irow, "icol": icol, "orow": irow, "ocol": icol, "wbit": module.bits, "w": integers}
    if isinstance(module, nn.Linear):
        facts |= {"type": "linear", "k": 1, "s": 1, "p": 0, "ich": module.in_features, "och": module.out_features, "groups": 1}
    else:
        k, s, p = module.kernel_size[0], module.stride[0], module.padding[0]
        if module.kernel_size != (k, k) or s != 1 or p != k // 2 or module.groups not in (1, ich):
            raise MixqExportError(f"{name}: the published format holds square kernels of stride 1 with 'same' padding, dense or depthwise")
        facts |= {"type": "conv", "k": k, "s": s, "p": p, "ich": ich, "och": module.out_channels, "groups": module.groups}
    bias = None if module.bias is None else module.bias.detach().float().numpy()
    return Layer(**facts, abit=abit, astep=act[1], actq_class=act[2], wstep=wstep, convbias=bias, w_unadjusted=raised)


# ---------------------------------------------------------------- the order of the hardware


def parallelism_of(network: IntegerNetwork, source: Parallelism | None) -> Array:
    """(convolutions, 2 or 4): simd, pe and for SkyNet actp, pep. source: rows, or a text file below a heading; None: the default.

    MixqExportError where a row does not divide its layer.
    """
    convs = [layer for layer in network.layers if layer.type == "conv"]
    columns = 4 if network.kind == "skynet" else 2
    if source is None:
        rows: Any = DEFAULT_PARALLELISM["skynetk5" if any(layer.k == 5 for layer in convs) else network.kind]
    elif isinstance(source, str | os.PathLike):
        lines = Path(source).read_text(encoding="utf-8").splitlines()[1:]
        try:
            rows = [[int(number) for number in line.split()] for line in lines if line.strip()]
        except ValueError:
            raise MixqExportError(f"{Path(source).name}: behind the heading each line is {columns} whole numbers") from None
    else:
        rows = source
    if len(rows) != len(convs) or any(len(row) != columns for row in rows):
        raise MixqExportError(
            f"parallelism: {len(convs)} rows of {columns} numbers ({'simd pe actp pep' if columns == 4 else 'simd pe'}) are needed, got "
            f"{len(rows)} of {sorted({len(row) for row in rows})}"
        )
    table = np.array(rows, dtype=np.int64)
    for layer, row in zip(convs, table.tolist(), strict=True):
        simd, pe, actp, pep = row if columns == 4 else [*row, row[1], 1]
        inner = layer.ich // layer.groups * (layer.k if layer.k > 1 else 1)
        outer = pe * (pep if layer.k == 1 else 1)
        if min(row) < 1 or inner % simd or layer.och % outer or layer.och % actp:
            raise MixqExportError(
                f"parallelism of conv_{layer.n}: simd {simd} must divide {inner} inputs, and pe{' x pep' if pep > 1 else ''} {outer} and "
                f"actp {actp} must divide {layer.och} outputs"
            )
    return table


@dataclass(frozen=True, eq=False)
class Reordered:
    """A layer's arrays in the order in which the hardware reads them; w has its lanes on the last axis. inc and bias may be missing."""

    w: Array
    inc: Array | None
    bias: Array | None


def reordered(layer: Layer, row: Sequence[int]) -> Reordered:
    """row: simd, pe[, actp, pep]. Element [p][kc][g (k ich / simd) + c], lane s, is w[g pe + p, i, kr, kc] with c simd + s = kr ich + i."""
    if layer.type == "linear":
        return Reordered(_linear_order(layer), layer.inc, layer.bias)
    simd, pe, actp, pep = row if len(row) == 4 else [*row, row[1], 1]
    w, inner = layer.w, layer.ich // layer.groups
    lanes: Array
    if layer.k == 1:
        lanes = w.reshape(-1, pe, pep, inner // simd, simd).transpose(1, 0, 3, 4, 2).reshape(pe, -1, simd * pep)
    else:
        by_column = w.transpose(0, 3, 2, 1).reshape(-1, pe, layer.k, layer.k * inner // simd, simd)
        lanes = by_column.transpose(1, 2, 0, 3, 4).reshape(pe, layer.k, -1, simd)
    inc, bias = (None if v is None else v.reshape(-1, actp).T for v in (layer.inc, layer.bias))
    return Reordered(lanes, inc, bias)


def _linear_order(layer: Layer) -> Array:
    """(1, h, ch / 8, w, out / 2, 8, 2): two outputs to a word, eight channels to a row."""
    channels = layer.ich // (layer.irow * layer.icol)
    if channels % 8 or layer.och % 2:
        raise MixqExportError(f"linear_{layer.n}: the format takes channels in eights and outputs in pairs, not {channels} and {layer.och}")
    w = layer.w.reshape(layer.och // 2, 2, channels // 8, 8, layer.irow, layer.icol)
    return w.transpose(4, 2, 5, 0, 3, 1)[None]


# ---------------------------------------------------------------- text


def hex_words(lanes: Array, bits: int) -> Array:
    """Words of the lanes on the last axis, lane 0 lowest, each in two's complement of `bits`, as quoted lower-case hexadecimal."""
    mask = (1 << bits) - 1
    rows = lanes.reshape(-1, lanes.shape[-1]).tolist()
    words = [f'"{hex(sum((value & mask) << (bits * lane) for lane, value in enumerate(row)))}"' for row in rows]
    return np.array(words, dtype=object).reshape(lanes.shape[:-1])


def _numbers(values: Array) -> Array:
    return np.array([f'"{hex(value)}"' for value in values.reshape(-1).tolist()], dtype=object).reshape(values.shape)


def _braces(items: Array) -> str:
    if items.ndim == 1:
        return "{" + ",".join(items.tolist()) + "}"
    return "{" + ",\n".join(_braces(part) for part in items) + "\n}"


def _array(kind: str, name: str, items: Array) -> str:
    return f"const {kind} {name}{''.join(f'[{n}]' for n in items.shape)}=\n{_braces(items)};\n"


def _head(file: str, guard: str, name: str, date: str) -> str:
    stars = "*" * 80
    about = f"* Filename: {file}\n* Date: {date}\n* Description: This file is generated by export_hls.py\n*   ptfilename: {name} \n"
    return f"/{stars}\n{about}{stars}/\n\n#ifndef {guard}\n#define {guard}\n"


def config_h(network: IntegerNetwork, parallelism: Array, name: str, date: str) -> str:
    """The header of sizes and widths. name: of the checkpoint."""
    text = _head("config.h", "_CONFIG_H_", name, date) + "\n"
    for i, layer in enumerate(network.layers):
        conv = layer.type == "conv"
        prefix = f"{layer.type}_{layer.n}"
        values = {
            **({"K": layer.k} if conv else {}),
            **{"IFM_CH": layer.ich, "IFM_ROW": layer.irow, "IFM_COL": layer.icol, "OFM_CH": layer.och},
            **({"OFM_ROW": layer.orow, "OFM_COL": layer.ocol} if conv else {}),
            **{"IN_BIT": layer.abit, "W_BIT": layer.wbit, "INC_BIT": layer.incbit, "BIAS_BIT": layer.biasbit},
            **({"SIMD": int(parallelism[i][0]), "PE": int(parallelism[i][1])} if conv else {}),
            "L_SHIFT": layer.lshift,
        }
        lines = [f"#define {prefix.upper()}_{key} {value}" for key, value in values.items() if value is not None]
        text += f"// {prefix}\n" + "\n".join(lines) + "\n\n"
    return text + "#endif\n"


def weights_hpp(network: IntegerNetwork, parallelism: Array, name: str, date: str) -> str:
    """The header of weights, increments and biases as arrays of hexadecimal text."""
    text = _head("weights.hpp", "_WEIGHTS_HPP_", name, date) + "#include <ap_int.h>\n\n"
    for i, layer in enumerate(network.layers):
        prefix, conv = f"{layer.type}_{layer.n}", layer.type == "conv"
        row = parallelism[i].tolist() if conv else []
        made = reordered(layer, row)
        about = [f"layer: {layer.n}", *([f"PE: {row[1]}"] if conv else [])]
        about += [f"PEP: {row[3]}"] if len(row) == 4 and layer.k == 1 else []
        about += [f"SIMD: {row[0]}"] if conv else []
        about += [f"ACTP: {row[2]}"] if len(row) == 4 else []
        text += f"// {', '.join([*about, f'wbit: {layer.wbit}'])}\n"
        text += _array(f"ap_uint<{layer.wbit * made.w.shape[-1]}>", f"{prefix}_w", hex_words(made.w, layer.wbit))
        for kind, values, bits in (("inc", made.inc, layer.incbit), ("bias", made.bias, layer.biasbit)):
            if values is not None:
                text += _array(f"ap_int<{bits}>", f"{prefix}_{kind}", _numbers(values))
    return text + "#endif\n"


# ---------------------------------------------------------------- files


def arrays(network: IntegerNetwork) -> dict[str, Array]:
    """layer<n>.<field> of every field that a layer has: what model_param.npz holds, from before the reordering."""
    found = {f"layer{layer.n}.{f.name}": getattr(layer, f.name) for layer in network.layers for f in fields(layer)}
    return {key: np.asarray(value) for key, value in found.items() if value is not None}


def write(
    network: IntegerNetwork,
    folder: str | os.PathLike[str],
    parallelism: Parallelism | None = None,
    *,
    name: str | None = None,
    date: str | None = None,
) -> list[Path]:
    """Writes config.h, weights.hpp and model_param.npz into `folder` (made if it is not there) and returns their paths.

    name: of the checkpoint, in the headers' comments, the folder's unless given; date: the present one unless given. MixqExportError as
    `parallelism_of`.
    """
    target = Path(folder)
    table = parallelism_of(network, parallelism)
    about = {"name": name or target.name, "date": date or datetime.now().strftime("%Y-%m-%d %H:%M:%S")}
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays(network))  # type: ignore[arg-type]
    contents = {
        "config.h": config_h(network, table, **about).encode("ascii"),
        "weights.hpp": weights_hpp(network, table, **about).encode("ascii"),
        "model_param.npz": archive.getvalue(),
    }
    target.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        handle, scratch = tempfile.mkstemp(dir=target, prefix=f".{file}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target / file)
    return [target / file for file in contents]
