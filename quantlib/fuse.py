"""FuSe layers in the place of the depthwise convolutions of any model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import nn

from quantlib import analysis
from quantlib._modules import replace_module
from quantlib._torch import ELEMENTWISE, IDENTITY
from quantlib.capture import Call, Record, record_once, refs, short_name
from quantlib.layers import FuSeConv2d, ScaledIntConv2d, ScaledIntLinear
from quantlib.layers.fuse_conv2d import Variant

# functions whose result has the channels of their argument, in the same order
_KEEP_CHANNELS = {*ELEMENTWISE, *IDENTITY, "mean", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "boolean_dispatch", "flatten",
                  "view", "reshape", "squeeze", "unsqueeze", "getitem"}  # fmt: skip
_PRODUCT = {"mul", "rmul", "imul", "multiply"}


class FuseError(ValueError):
    """A layer that cannot be replaced; the message names it and what would work."""


def depthwise(model: nn.Module) -> list[str]:
    """Dotted names of the depthwise convolutions that a FuSe layer can replace: as many groups as channels, an odd square kernel above 1,
    "same" padding, dilation 1."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and _fits(module) is None]


def _fits(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be replaced; None where it can."""
    kh, kw = conv.kernel_size
    if not conv.groups == conv.in_channels == conv.out_channels > 1:
        return f"it is not depthwise ({conv.groups} groups, {conv.in_channels} to {conv.out_channels} channels)"
    if kh != kw or kh % 2 == 0 or kh == 1:
        return f"its kernel {kh}x{kw} is not square, odd and above 1"
    if conv.dilation != (1, 1) or conv.padding not in ((kh // 2, kh // 2), "same") or conv.padding_mode != "zeros":
        return f"padding {conv.padding}, dilation {conv.dilation}, padding_mode {conv.padding_mode!r}; it must pad {kh // 2} zeros"
    return f"its strides {conv.stride} differ" if conv.stride[0] != conv.stride[1] else None


def replace_depthwise(
    model: nn.Module,
    input_shape: tuple[int, ...],
    variant: Variant = "half",
    *,
    names: Iterable[str] | None = None,
    share: float = 1.0,
    rows: int = 64,
    cols: int = 64,
    conv: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """A copy of `model` (N, *input_shape) with FuSe layers, freshly initialised, in the place of its depthwise convolutions.

    variant "half" keeps the number of channels. "full" doubles it behind the layer: batch norms, PReLUs and squeeze-excite layers on the
    way are widened, up to the next dense convolution or linear layer, whose weights for both halves are the old ones, halved.
    names: the layers, in any order; else those of the greatest gain, `share` of them (1.0: all), by `gains` on a rows x cols array.
    conv: class of the 1-D convolutions; by default that of the layer (torch.nn.Conv2d, ScaledIntConv2d with its bits).

    FuseError, naming the layer, for what cannot be replaced or widened (an add with something that keeps its channels); the model itself is
    never changed. Source: FuSeConv (DATE 2021), sections III and V; the choice by gain is ours, the published hybrids are in the zoo.
    """
    chosen = list(names) if names is not None else _by_gain(model, input_shape, variant, share, rows, cols, conv)
    known = dict(model.named_modules())
    for name in chosen:
        if not name:
            raise FuseError(f"the model itself is a {type(model).__name__}; put it into an nn.Sequential")
        module = known.get(name)
        if not isinstance(module, nn.Conv2d):
            raise FuseError(f"{name!r} is no convolution of the model; its depthwise ones are {', '.join(depthwise(model)) or 'none'}")
        reason = _fits(module)
        if reason is not None:
            raise FuseError(f"{name}: {reason}")
    result = copy.deepcopy(model)
    for name in chosen:
        if variant == "full":
            _Widening(result, record_once(result, input_shape), name).run()
        layer = result.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        replace_module(result, name, _fuse_layer(name, layer, variant, conv))
    return result


@dataclass(frozen=True)
class Gain:
    """What replacing one layer saves: cycles of the whole network before minus after."""

    name: str
    cycles: int


def gains(
    model: nn.Module, input_shape: tuple[int, ...], variant: Variant = "half", rows: int = 64, cols: int = 64,
    conv: Callable[..., nn.Module] | None = None,
) -> list[Gain]:  # fmt: skip
    """The gain of each depthwise layer alone, greatest first (of equal ones the earlier): cycles on a "systolic" array minus those of the
    network with that layer replaced on a "fuse" array. One run of the model per layer."""
    before = analysis.systolic_latency(model, input_shape, rows, cols, "systolic").cycles
    found = []
    for name in depthwise(model):
        after = replace_depthwise(model, input_shape, variant, names=[name], conv=conv)
        found.append(Gain(name, before - analysis.systolic_latency(after, input_shape, rows, cols, "fuse").cycles))
    return sorted(found, key=lambda gain: -gain.cycles)


def _by_gain(model: nn.Module, input_shape: tuple[int, ...], variant: Variant, share: float, rows: int, cols: int, conv: Any) -> list[str]:
    if not 0 <= share <= 1:
        raise FuseError(f"share={share} is a part of the depthwise layers, 0 to 1")
    names = depthwise(model)
    if share in (0, 1):
        return names if share else []
    count = ceil(share * len(names))
    best = {gain.name for gain in gains(model, input_shape, variant, rows, cols, conv)[:count]}
    return [name for name in names if name in best]


def _fuse_layer(name: str, layer: nn.Conv2d, variant: Variant, conv: Callable[..., nn.Module] | None) -> FuSeConv2d:
    if conv is None:
        if isinstance(layer, ScaledIntConv2d):
            conv = partial(ScaledIntConv2d, **_bits(layer))
        elif type(layer) is nn.Conv2d:
            conv = nn.Conv2d
        else:
            kind = type(layer).__name__
            raise FuseError(f"{name}: a {kind}; say the class of its 1-D convolutions, conv=functools.partial({kind}, ...)")
    if variant == "half" and layer.in_channels % 2:
        raise FuseError(f"{name}: {layer.in_channels} channels cannot be halved; use variant='full'")
    fuse = FuSeConv2d(layer.in_channels, layer.kernel_size[0], layer.stride[0], variant=variant, conv=conv, bias=layer.bias is not None)
    return fuse.to(layer.weight.device, layer.weight.dtype).train(layer.training)


# ---------------------------------------------------------------- widening for the full variant


@dataclass
class _Widening:
    """Doubles the channels of everything between layer `name` and the dense layers that read it."""

    model: nn.Module
    record: Record
    name: str
    done: set[str] = field(default_factory=set)

    def run(self) -> None:
        calls = self.record.calls
        starts = [i for i, call in enumerate(calls) if call.path == self.name]
        if len(starts) != 1:
            raise FuseError(f"{self.name} runs {len(starts)} times; the full variant needs a layer that runs once")
        double = {r.index for r in refs(calls[starts[0]].out)}
        for call in calls[starts[0] + 1 :]:
            if any(r.index in double for r in refs((call.args, call.kwargs))) and self.passes_on(call, double):
                double |= {r.index for r in refs(call.out)}
        if any(r.index in double for r in refs(self.record.output)):
            raise FuseError(f"{self.name}: its channels reach the output of the model; the full variant needs a dense layer behind it")

    def passes_on(self, call: Call, double: set[int]) -> bool:
        """Widens what one call needs; says whether its output has twice the channels, too."""
        if not isinstance(call.target, nn.Module):
            return self.function(call, double)
        layer = self.model.get_submodule(call.path)
        if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "groups", 1) == 1:
            self.put(call.path, _wider(call.path, layer, inputs=True))
            return False
        if isinstance(layer, nn.BatchNorm2d):
            self.put(call.path, _wider_norm(layer))
        elif isinstance(layer, nn.PReLU) and layer.weight.numel() > 1:
            wider = nn.PReLU(2 * layer.weight.numel()).to(layer.weight.device, layer.weight.dtype)
            wider.weight.data = layer.weight.data.repeat(2)
            self.put(call.path, wider)
        elif any(p.numel() > 1 for p in layer.parameters()):
            kind = type(layer).__name__
            raise FuseError(f"{self.name}: its channels go through {call.path} ({kind}), which has no rule for twice as many")
        return True

    def function(self, call: Call, double: set[int]) -> bool:
        kind = short_name(call.target)
        if kind not in _KEEP_CHANNELS:
            raise FuseError(f"{self.name}: its channels go through {call}, which has no rule for twice as many")
        narrow = [i for r in refs((call.args, call.kwargs)) if (i := r.index) not in double]
        if narrow and self.record.shapes[narrow[0]][1] > 1:
            if kind not in _PRODUCT:
                raise FuseError(f"{self.name}: its channels meet others in {call}; replace it by the half variant")
            self.widen_producer(narrow[0])
            double.add(narrow[0])
        return True

    def widen_producer(self, index: int) -> None:
        """Doubles the outputs of the dense layer whose result, through elementwise steps, is tensor `index`: a gate's last layer."""
        by_output = {r.index: call for call in self.record.calls for r in refs(call.out)}
        while index in by_output:
            call = by_output[index]
            layer = self.model.get_submodule(call.path) if isinstance(call.target, nn.Module) else None
            if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "groups", 1) == 1:
                self.put(call.path, _wider(call.path, layer, inputs=False))
                return
            if isinstance(layer, nn.BatchNorm2d):
                self.put(call.path, _wider_norm(layer))
            index = next((r.index for r in refs((call.args, call.kwargs))), -1)
        raise FuseError(f"{self.name}: the other factor of a product behind it comes from no dense layer")

    def put(self, path: str, layer: nn.Module) -> None:
        if path in self.done:
            wide = type(layer).__name__
            raise FuseError(f"{self.name}: {path} ({wide}) reads its channels twice; the full variant needs layers that run once behind it")
        self.done.add(path)
        replace_module(self.model, path, layer)


def _wider(name: str, layer: nn.Module, inputs: bool) -> nn.Module:
    """A dense layer with twice the inputs (weights halved and repeated) or twice the outputs (weights repeated)."""
    wider: Any
    if type(layer) in (nn.Conv2d, ScaledIntConv2d):
        assert isinstance(layer, nn.Conv2d)
        shape: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "bias": layer.bias is not None,
        }
        like: Any = type(layer)
        wider = like(layer.in_channels * (1 + inputs), layer.out_channels * (2 - inputs), layer.kernel_size, **shape, **_bits(layer))
    elif type(layer) in (nn.Linear, ScaledIntLinear):
        assert isinstance(layer, nn.Linear)
        sizes = (layer.in_features * (1 + inputs), layer.out_features * (2 - inputs))
        wider = type(layer)(*sizes, bias=layer.bias is not None, **_bits(layer))
    else:
        kind = type(layer).__name__
        raise FuseError(f"{name}: a {kind} cannot be widened; convolutions and linear layers of torch.nn and ScaledInt ones can")
    weight: torch.Tensor = layer.weight.data
    wider = wider.to(weight.device, weight.dtype).train(layer.training)
    with torch.no_grad():
        wider.weight.copy_(torch.cat([weight, weight], 1) / 2 if inputs else torch.cat([weight, weight], 0))
        if layer.bias is not None:
            wider.bias.copy_(layer.bias if inputs else layer.bias.repeat(2))
    return wider  # type: ignore[no-any-return]


def _bits(layer: Any) -> dict[str, Any]:
    return {"bits": int(layer.weight_quant.bit_width())} if isinstance(layer, ScaledIntConv2d | ScaledIntLinear) else {}


def _wider_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    wider = nn.BatchNorm2d(2 * norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    wider.load_state_dict({key: value.repeat(2) if value.dim() else value for key, value in norm.state_dict().items()})
    return wider.to(norm.weight.device, norm.weight.dtype).train(norm.training)
