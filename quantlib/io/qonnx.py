"""Models as QONNX files: standard ONNX operators with Quant, BipolarQuant and Trunc nodes of the domain `qonnx.custom_op.general`.

Brevitas writes the graph. What is added here: a Quant node is only v = s * (clip(rne(x / s + z), lo, hi) - z), so every quantizer of the
model is compared with its node; weights that a quantizer does more to (tanh, a normalisation) are stored quantized, which the node maps to
themselves; gated convolutions are written as two convolutions of bit planes, truncating pools as sums of codes, shifts as convolutions;
failures name the layer; the file appears whole or not at all.
Source of the format: Pappalardo et al., QONNX: Representing Arbitrary-Precision Quantized Neural Networks (arXiv 2206.07527).
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brevitas.proxy import ActQuantProxyFromInjector
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode

from quantlib._modules import replace_module
from quantlib.layers import BinaryConv2d, FractionalConv2d, Shift2d, TruncAvgPool
from quantlib.layers.fractional_conv2d import gate

OPSET = 13  # of the standard operators; the newest that the QONNX tools read everywhere
NEEDS = ("onnx", "onnxoptimizer")
OFF_TIE = 1e-3  # of a step: nearer to a tie, two correct formulas may round to different sides


class QonnxError(ValueError):
    """The model has no faithful QONNX form; the message names the layer and what would have one."""


def quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, signed: bool, narrow: bool) -> Tensor:
    """Codes of QONNX' Quant node: clip(rne(x / s + z), lo, hi) - z; with one bit BipolarQuant: -1 where x < 0, else 1. Shape of x."""
    if bits == 1:
        return torch.where(x >= 0, 1.0, -1.0)
    half = 2 ** (bits - 1)
    lo, hi = (-half + int(narrow), half - 1) if signed else (0, 2 * half - 1 - int(narrow))
    return (x / scale + zero_point).round().clamp(lo, hi) - zero_point


def export(model: nn.Module, path: str | Path, input_shape: Sequence[int], batch: int = 1) -> Any:
    """Writes `model`, in eval mode, as QONNX; returns the onnx.ModelProto that is in the file.

    input_shape (C, H, W) of one float image; the file has the fixed shape (batch, C, H, W), one input `input`, and initializers and nodes
    that bear the dotted names of the model. The model is not changed. Raises QonnxError where a quantizer is not what a Quant node
    computes or an operation has no ONNX operator, ModuleNotFoundError without the packages of `pip install 'quantlib-fpga[onnx]'`.
    """
    missing = [name for name in NEEDS if not _installed(name)]
    if missing:
        raise ModuleNotFoundError(f"QONNX export needs {' and '.join(missing)}: pip install 'quantlib-fpga[onnx]'")
    ours = _plain(copy.deepcopy(model)).float().cpu().eval()
    check_activations(ours)
    graph = _brevitas(ours, torch.zeros(batch, *input_shape))
    _settle_weights(graph, ours)
    constants = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in constants]  # an initializer that is an input could be overridden
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    _write(Path(path), graph.SerializeToString())
    return graph


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


# --- quantizers and their nodes ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_activations(model: nn.Module) -> None:
    """Every activation quantizer of a model in eval mode against its node: at all levels, beyond the ends, and next to every tie."""
    for name, proxy in model.named_modules():
        if not isinstance(proxy, ActQuantProxyFromInjector) or not proxy.is_quant_enabled:
            continue
        layer = name.rpartition(".")[0] or name
        scale, zero_point, bits = proxy.scale(), proxy.zero_point(), int(proxy.bit_width())
        if bits > 16:
            continue  # too many levels to try; and then an ordinary quantizer of Brevitas
        if bits == 1 and bool((zero_point != 0).any()):
            raise QonnxError(f"{layer}: one bit with a zero point; BipolarQuant has only the levels -s and s. Two bits have a Quant node")
        reach = 2**bits + 2
        steps = torch.cat([torch.arange(-reach, reach) + at for at in (0.0, 0.5 - OFF_TIE, 0.5 + OFF_TIE)]).reshape(-1, 1, 1, 1)
        x = (steps - zero_point.reshape(-1)[0].frac()) * scale.reshape(1, -1, 1, 1)
        real = proxy.fused_activation_quant_proxy.activation_impl(x)
        wanted = quant(real, scale, zero_point, bits, bool(proxy.is_signed), bool(proxy.is_narrow_range))
        got = (proxy.fused_activation_quant_proxy(x)[0] / scale + zero_point).round() - zero_point
        if not torch.equal(got, wanted):
            worst = x.expand_as(got).reshape(-1)[int((got != wanted).reshape(-1).nonzero()[0])]
            raise QonnxError(
                f"{layer}: at {float(worst):.6g} its quantizer gives another code than a Quant node of its scale, zero point and bits. "
                f"Quantizers that round half to even after a division by their scale have a node"
            )


@torch.no_grad()
def _settle_weights(graph: Any, model: nn.Module) -> None:
    """Quantized parameters into the initializers of Quant nodes that would make other codes of the real ones."""
    from onnx import numpy_helper

    values = {tensor.name: tensor for tensor in graph.graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(np.array(numpy_helper.to_array(values[name])))

    for node in graph.graph.node:
        if node.op_type not in ("Quant", "BipolarQuant") or node.input[0] not in values:
            continue
        name, layer, kind = node.input[0], *_owner(node.input[0], model)
        wanted = _quantized(layer, kind)
        if wanted is None:
            continue
        scale, more = read(node.input[1]), [read(k) for k in node.input[2:]]
        flags = {a.name: a.i for a in node.attribute}
        zero_point, bits = more if more else (torch.zeros(()), torch.ones(()))
        facts = (scale, zero_point, int(bits), bool(flags.get("signed", 1)), bool(flags.get("narrow", 0)))
        codes = (wanted / scale + zero_point).round() - zero_point
        if torch.equal(quant(read(name), *facts), codes):
            continue
        if not torch.equal(quant(wanted, *facts), codes):
            hint = "; a weight that is exactly 0 has no sign: sign_of_zero=1 gives it one" if int(bits) == 1 else ""
            held = f"{float(codes.min()):g}..{float(codes.max()):g}"
            raise QonnxError(f"{name}: its integers are {held}, which {node.op_type} of {int(bits)} bit(s) cannot hold{hint}")
        values[name].CopyFrom(numpy_helper.from_array(wanted.numpy(), name))


def _owner(name: str, model: nn.Module) -> tuple[nn.Module, str]:
    path, _, kind = name.rpartition(".")
    return model.get_submodule(path), kind


def _quantized(layer: nn.Module, kind: str) -> Tensor | None:
    """The quantized parameter; None for a bias whose scale is that of the accumulator, which the file holds as an expression."""
    if kind == "weight":
        value: Tensor = layer.quant_weight().value  # type: ignore[operator]
        return value
    proxy = layer.bias_quant
    if proxy.requires_input_scale:  # type: ignore[union-attr]
        return None
    bias: Tensor = proxy(layer.bias).value  # type: ignore[operator]
    return bias


# --- layers that ONNX has no operator for --------------------------------------------------------------------------------------------


class _TwoPlanes(nn.Module):
    """FractionalConv2d on thirds in eval mode: with 3q = 2m + l, M = conv(m) and L = conv(l), y = (2M + L where the gate is open) / 3."""

    def __init__(self, layer: FractionalConv2d) -> None:
        super().__init__()
        size, window = (layer.in_channels, layer.out_channels, layer.kernel_size), (layer.stride, layer.padding, layer.dilation)
        self.plane = BinaryConv2d(*size, *window, layer.groups, sign_of_zero=layer.sign_of_zero, real_weights=layer.real_weights)
        self.plane.weight, self.threshold = layer.weight, layer.threshold

    def forward(self, q: Tensor) -> Tensor:
        high = torch.sign(q)
        double = 2 * self.plane(high)
        is_open = gate(double / 3, self.threshold) > 0.5
        return (double + is_open.to(q.dtype) * self.plane((3 * q).round() - 2 * high)) / 3


class _TruncPool(nn.Module):
    """TruncAvgPool: the average times the window's size is the sum of codes, an integer that is rounded to be one."""

    def __init__(self, layer: TruncAvgPool) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        window = self.layer.kernel_size
        codes = (x.value / x.scale).round()
        total = (nn.functional.avg_pool2d(codes, window, self.layer.stride, self.layer.padding) * (window[0] * window[1])).round()
        value = (total * 2.0**-self.layer.shift).floor() * x.scale
        return x.set(value=value) if self.layer.return_quant_tensor else value


class _Moved(nn.Conv2d):
    """Shift2d as a depthwise convolution with one-hot kernels."""

    def __init__(self, layer: Shift2d) -> None:
        kernel = layer.kernel()
        size = kernel.shape[-1]
        super().__init__(layer.channels, layer.channels, size, padding=size // 2, groups=layer.channels, bias=False)
        self.weight = nn.Parameter(kernel)


class _Rewritten(TorchFunctionMode):
    """Calls that the exporter would get wrong without a word, or that have no operator, as calls that mean the same."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.avg_pool2d:  # AveragePool divides by the window's size, whatever else is asked for
            names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
            given = dict(zip(names, args)) | kwargs
            divisor, (rows, columns) = given.pop("divisor_override", None), _pair(given["kernel_size"])
            pooled = function(**given)
            return pooled if divisor is None else pooled * (rows * columns / divisor)
        if function in (torch.trunc, Tensor.trunc):
            return torch.sign(args[0]) * torch.floor(torch.abs(args[0]))
        if function is nn.functional.conv2d and args[0].dtype == torch.float64:
            raise QonnxError("it convolves in float64, for which ONNX runtimes have no kernel")
        if function is Tensor.__setitem__:
            raise QonnxError("it writes into a part of a tensor, which the exporter may lose; join parts with torch.cat instead")
        return function(*args, **kwargs)


_PLAIN: dict[type[nn.Module], Any] = {FractionalConv2d: _TwoPlanes, TruncAvgPool: _TruncPool, Shift2d: _Moved}


def _plain(model: nn.Module) -> nn.Module:
    """The model with such layers replaced, in place."""
    whole = nn.ModuleList([model])
    for name, module in list(whole.named_modules()):
        if type(module) in _PLAIN:
            replace_module(whole, name, _PLAIN[type(module)](module))
    return whole[0]


# --- writing -------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The dotted names of the modules that are being run, the innermost last; after an exception those it went through."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = [m.register_forward_pre_hook(lambda *_, name=name: stack.append(name)) for name, m in model.named_modules()]  # type: ignore[misc]
    hooks += [m.register_forward_hook(leave) for m in model.modules()]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _brevitas(model: nn.Module, x: Tensor) -> Any:
    from brevitas.export import export_qonnx

    names = {"input_names": ["input"], "output_names": ["output"]}
    with _running(model) as stack, _Rewritten(), redirect_stdout(io.StringIO()):  # torch prints its whole graph when it fails
        try:
            return export_qonnx(model, x, opset_version=OPSET, dynamo=False, **names)
        except Exception as error:  # whatever tracing or an operator's translation raises
            place = stack[-1] if stack and stack[-1] else "the model"
            first = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
            raise QonnxError(f"{place} has no ONNX form: {first}") from error


def _write(path: Path, data: bytes) -> None:
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
