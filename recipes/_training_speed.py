"""How long a training step takes: ours over the float network's and over plain Brevitas', and FracBNN's over its published formulation.

A step is forward, loss and backward, in CPU seconds of one thread; the variants of a network take turns in one process, and medians are
compared. Same network, same layout: the float twin has nn.Conv2d, nn.Linear and ReLU6 in place, and nothing where a signed quantizer is.
On a GPU the same, eager and under torch.compile, behind all work.
`measure` is what recipes/benchmark.py calls; alone:

    OMP_NUM_THREADS=1 python recipes/_training_speed.py --networks mb_16x64,fracbnn_64 --rounds 7
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from brevitas import nn as qnn
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.inject.enum import RestrictValueType
from brevitas.quant import (
    Int8ActPerTensorFloatMinMaxInit,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloatMaxInit,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import Function

import zoo
from quantlib._modules import replace_module
from quantlib.layers import (
    BinaryConv2d,
    DividedClip,
    FractionalConv2d,
    HalfWave,
    LearnedScaleHardTanh,
    LearnedScaleReLU,
    QuantSign,
    RPReLU,
    ScaledIntConv2d,
    ScaledIntLinear,
    SharedHardTanh,
    ThermometerEncoder,
    TruncAvgPool,
)

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TARGETS = {
    "dense": {"NCHW": 1.15, "channels_last": 1.15},
    "depthwise": {"NCHW": 1.25, "channels_last": 1.5},
    "fracbnn": {"NCHW": 0.6, "channels_last": 0.6},
}  # most that a step may cost, over the float twin's (fracbnn: over the published step in NCHW)
OF_BREVITAS = 0.7  # the same over plain Brevitas', depthwise networks


# --- networks ------------------------------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """Inverted bottleneck: 1x1 to `middle` channels, depthwise 3x3, 1x1; joined with its input by `join` where shapes allow."""

    def __init__(self, channels: int, middle: int, out: int, stride: int, join: nn.Module) -> None:
        super().__init__()
        widen: list[nn.Module] = [
            ScaledIntConv2d(channels, middle, 1, bits=4),
            nn.BatchNorm2d(middle),
            LearnedScaleReLU(4, channels=middle),
        ]
        self.body = nn.Sequential(
            *(widen if middle != channels else []),
            ScaledIntConv2d(middle, middle, 3, stride, 1, groups=middle, bits=4),
            nn.BatchNorm2d(middle),
            LearnedScaleReLU(4),
            ScaledIntConv2d(middle, out, 1, bits=4),
            nn.BatchNorm2d(out),
            join,
        )
        self.join, self.joined = join, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x + self.body(x)) if self.joined else self.body(x)


class Bottlenecks(nn.Module):
    """24 convolutions, 8 of them depthwise: (N, 3, H, W) -> (N, 10). 4-bit weights with one scale per channel, 4-bit learned scales."""

    ROWS = ((16, 1, 1), (24, 6, 2), (24, 6, 1), (32, 6, 2), (32, 6, 1), (64, 6, 2), (64, 6, 1), (64, 6, 1))  # out, expansion, stride

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(ScaledIntConv2d(3, 16, 3, 1, 1, bits=8), nn.BatchNorm2d(16), LearnedScaleReLU(4, channels=16))
        channels, units = 16, []
        join = SharedHardTanh(4)
        for out, expansion, stride in self.ROWS:
            join = join if stride == 1 and channels == out else SharedHardTanh(4)
            units.append(Inverted(channels, channels * expansion, out, stride, join))
            channels = out
        self.units, self.linear = nn.Sequential(*units), ScaledIntLinear(channels, 10, bits=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.units(self.first(x)).mean((2, 3)))


def dense() -> nn.Module:
    """Six dense 3x3 convolutions of VGG's shape: (N, 3, H, W) -> (N, 10), 4 bits."""
    layers: list[nn.Module] = []
    channels = 3
    for out, pool in ((64, False), (64, True), (128, False), (128, True), (256, False), (256, True)):
        layers += [ScaledIntConv2d(channels, out, 3, 1, 1, bits=4), nn.BatchNorm2d(out), LearnedScaleReLU(4)]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), ScaledIntLinear(channels, 10, bits=8))


@dataclass(frozen=True)
class Network:
    """build() -> our network; its kind chooses the target; shape of the images, batch included."""

    build: Callable[[], nn.Module]
    kind: Literal["dense", "depthwise", "fracbnn"]
    shape: tuple[int, int, int, int]


_ENDS = {"last_weight_bits": 8, "last_act_bits": 8, "fc_weight_bits": 8}
NETWORKS = {
    "mb_16x64": Network(Bottlenecks, "depthwise", (16, 3, 64, 64)),
    "mb_4x32": Network(Bottlenecks, "depthwise", (4, 3, 32, 32)),
    "vgg_32x32": Network(dense, "dense", (32, 3, 32, 32)),
    "vgg_4x32": Network(dense, "dense", (4, 3, 32, 32)),
    "proxylessnas_4x128": Network(
        lambda: zoo.get("proxylessnas_4b5b_imagenet", image_size=128, width=0.5, num_classes=100), "depthwise", (4, 3, 128, 128)
    ),
    "mobilenet_v2_8x64": Network(
        lambda: zoo.get("mobilenet_v2_imagenet", weight_bits=4, act_bits=4, num_classes=100), "depthwise", (8, 3, 64, 64)
    ),
    "vggtiny_32x32": Network(lambda: zoo.get("vggtiny_cifar10", weight_bits=4, act_bits=4), "dense", (32, 3, 32, 32)),
    "diracdeltanet_32x32": Network(
        lambda: zoo.get("diracdeltanet_cifar10", weight_bits=4, act_bits=4, first_weight_bits=8, first_act_bits=4, **_ENDS),
        "dense",
        (32, 3, 32, 32),
    ),
    "fracbnn_64": Network(lambda: zoo.get("fracbnn_cifar10"), "fracbnn", (64, 3, 32, 32)),
}


QUICK = ("mb_4x32", "vgg_4x32")


# --- twins ---------------------------------------------------------------------------------------------------------------------------


class StockUnsigned(Uint8ActPerTensorFloatMaxInit):
    """UintActLearnedLog2Scale in plain Brevitas."""

    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16


class StockSigned(Int8ActPerTensorFloatMinMaxInit):
    """IntActLearnedLog2Scale in plain Brevitas."""

    restrict_scaling_type = RestrictValueType.LOG_FP
    restrict_threshold_impl = FloatRestrictValue
    scaling_min_val = 2e-16


def _swapped(model: nn.Module, twin: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the model with twin(module) in the place of every module that has one."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        new = twin(module)
        if new is not None:
            replace_module(model, name, new)
    return model


class _Join(nn.Identity):
    """What stands for a SharedHardTanh without quantizers."""

    def add(self, identity: Tensor, body: Tensor) -> Tensor:
        return identity + body


def _real(m: nn.Module) -> nn.Module | None:
    if isinstance(m, qnn.QuantConv2d):
        shape = (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        return nn.Conv2d(*shape, bias=m.bias is not None)  # type: ignore[arg-type]
    if isinstance(m, qnn.QuantLinear):
        return nn.Linear(m.in_features, m.out_features, m.bias is not None)
    if isinstance(m, (LearnedScaleReLU, HalfWave, DividedClip)):
        return nn.ReLU6(inplace=True)
    if isinstance(m, SharedHardTanh):
        return _Join()
    if isinstance(m, LearnedScaleHardTanh):
        return nn.Identity()
    if isinstance(m, TruncAvgPool):
        return nn.AvgPool2d(m.kernel_size, m.stride)
    return None


def float_twin(model: nn.Module) -> nn.Module:
    """The network without quantizers."""
    return _swapped(model, _real)


class _StockJoin(qnn.QuantHardTanh):
    """What stands for a SharedHardTanh in plain Brevitas."""

    def add(self, identity: Any, body: Tensor) -> Any:
        return self(identity + self(body))


def _brevitas(m: nn.Module) -> nn.Module | None:
    if isinstance(m, (ScaledIntConv2d, ScaledIntLinear)):
        quant = m.weight_quant
        stock: Any = Int8WeightPerChannelFloat if quant.tensor_quant.channel is not None else Int8WeightPerTensorFloat
        options = {"weight_quant": stock, "weight_bit_width": quant.tensor_quant.bits, "weight_scaling_min_val": 2e-16}
        if isinstance(m, ScaledIntLinear):
            return qnn.QuantLinear(m.in_features, m.out_features, m.bias is not None, **options)
        shape = (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        return qnn.QuantConv2d(*shape, bias=m.bias is not None, **options)
    if isinstance(m, (LearnedScaleReLU, LearnedScaleHardTanh)):
        channels = (
            {} if m.channels is None else {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (1, m.channels, 1, 1)}
        )
        channels["return_quant_tensor"] = m.return_quant_tensor
        if isinstance(m, LearnedScaleReLU):
            return qnn.QuantReLU(act_quant=StockUnsigned, bit_width=m.bits, max_val=6.0, **channels)
        shared = _StockJoin if isinstance(m, SharedHardTanh) else qnn.QuantHardTanh
        return shared(act_quant=StockSigned, bit_width=m.bits, min_val=-10.0, max_val=10.0, **channels)
    return None


def stock_twin(model: nn.Module) -> nn.Module | None:
    """The same layers with Brevitas' own quantizers; None where it has no counterpart."""
    if any(isinstance(m, (HalfWave, DividedClip)) for m in model.modules()):
        return None
    return _swapped(model, _brevitas)


# --- FracBNN as published ------------------------------------------------------------------------------------------------------------


class _Quantized(Function):
    """QuantSign: the rounded value, with the gradient of the clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        step = 2.0 / 3
        return torch.round((torch.clamp(x, -1, 1) + 1) / step) * step - 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x > -1) & (x < 1), grad, torch.zeros_like(grad))


class _Open(Function):
    """1 where x > 1/2; the gradient passes where x >= 1/2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0.5, torch.ones_like(x), torch.zeros_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x >= 0.5, grad, torch.zeros_like(grad))


def _sign(x: Tensor) -> Tensor:
    """sgn(x) with the gradient of a clamp to 1.3."""
    clipped = torch.clamp(x, -1.3, 1.3)
    return torch.sign(x).detach() - clipped.detach() + clipped


class _Encoder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(32, dtype=x.dtype).reshape(1, 1, 32, 1, 1).expand(len(x), x.shape[1], 32, *x.shape[2:])
        level = torch.round(x * 255 / 8).unsqueeze(2)
        return torch.where(places < level, torch.ones_like(places), -torch.ones_like(places)).flatten(1, 2)


class _Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Quantized.apply(x)


class _Conv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _sign(self.weight), None, self.stride, self.padding)


class _GatedConv(nn.Conv2d):
    def __init__(self, channels: int, out: int, kernel: Any, stride: Any, padding: Any) -> None:
        super().__init__(channels, out, kernel, stride, padding, bias=False)
        self.threshold = nn.Parameter(torch.full((1, out, 1, 1), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        high = F.conv2d(_sign(x), _sign(self.weight), None, self.stride, self.padding) * 2 / 3
        gate = _Open.apply(torch.sigmoid(5 * (high - self.threshold)))
        full = F.conv2d(x, _sign(self.weight), None, self.stride, self.padding)
        self.num_out, self.num_high = gate.numel(), gate.detach().sum().item()
        return (1 - gate) * high + gate * full


class _RPReLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift_x, self.shift_y = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(x + self.shift_x) + self.shift_y


def _published(m: nn.Module) -> nn.Module | None:
    if isinstance(m, ThermometerEncoder):
        return _Encoder()
    if isinstance(m, QuantSign):
        return _Sign()
    if isinstance(m, BinaryConv2d):
        return _Conv(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, bias=False)  # type: ignore[arg-type]
    if isinstance(m, FractionalConv2d):
        return _GatedConv(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding)
    return _RPReLU(m.prelu.num_parameters) if isinstance(m, RPReLU) else None


def published(model: nn.Module) -> nn.Module:
    """fracbnn_cifar10 as the published code computes it: the same operations on autograd's own tensors, two convolutions per gated layer.

    Source: FracBNN (arXiv 2012.12206), published code, layers of the training script
    """
    return _swapped(model, _published)


# --- measuring -----------------------------------------------------------------------------------------------------------------------


def step(model: nn.Module, x: Tensor, y: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """One forward and backward; gradients are left on the parameters, which are listed once, as in an optimizer: Brevitas' modules nest."""
    for p in parameters:
        p.grad = None
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def variants(network: Network, model: nn.Module) -> dict[str, nn.Module]:
    """Name -> network: "ours" and what it is compared with."""
    if network.kind == "fracbnn":
        return {"published": published(model), "ours": model}
    made = {"float": float_twin(model), "ours": model}
    stock = stock_twin(model)
    return made | ({} if stock is None else {"brevitas": stock})


def _clock(device: str) -> float:
    """Seconds: of this thread on the CPU (forward and backward run in it), of the clock behind all work on a GPU."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    networks: Sequence[str] = tuple(NETWORKS), rounds: int = 7, device: str = "cpu", compiled: bool = False
) -> list[dict[str, Any]]:
    """One row per network and layout: network, kind, layout, batch, device, over ("float" or "published"), seconds per step of each
    variant, spread (largest over smallest step of ours), ratio, target, and of_brevitas where plain Brevitas has the quantizers.

    Every variant takes a step in each round. compiled: under torch.compile (for GPUs). The published formulation of FracBNN is in NCHW,
    and both of our layouts are compared with it. ValueError for an unknown network.
    """
    unknown = set(networks) - set(NETWORKS)
    if unknown:
        raise ValueError(f"no network {', '.join(sorted(unknown))} to train; there are {', '.join(NETWORKS)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name in networks for row in _rows(name, rounds, device, compiled)]
    finally:
        torch.set_num_threads(threads)


def _rows(name: str, rounds: int, device: str, compiled: bool) -> list[dict[str, Any]]:
    network = NETWORKS[name]
    torch.manual_seed(0)
    x, y = torch.rand(network.shape, device=device), torch.randint(0, 10, network.shape[:1], device=device)
    found: dict[tuple[str, str], Any] = {}
    for way, model in variants(network, network.build().train()).items():
        for layout in ("NCHW",) if way == "published" else FORMATS:
            one = copy.deepcopy(model).to(device=device, memory_format=FORMATS[layout])  # type: ignore[call-overload]
            found[way, layout] = torch.compile(one) if compiled else one
    parameters = {key: list(model.parameters()) for key, model in found.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in found}
    for turn in range(rounds + 2):  # two untimed
        for key, model in found.items():
            images = x.contiguous(memory_format=FORMATS[key[1]])
            start = _clock(device)
            step(model, images, y, parameters[key])
            if turn > 1:
                times[key].append(_clock(device) - start)
    middle = {key: statistics.median(values) for key, values in times.items()}
    over = "published" if network.kind == "fracbnn" else "float"
    rows = []
    for layout in FORMATS:
        seconds = {way: value for (way, where), value in middle.items() if layout == where or way == "published"}
        ours = times["ours", layout]
        row = {"network": name, "kind": network.kind, "layout": layout, "batch": network.shape[0], "device": device, "over": over}
        row |= {"seconds": seconds, "spread": max(ours) / min(ours)}
        row |= {"ratio": seconds["ours"] / seconds[over], "target": TARGETS[network.kind][layout]}
        rows.append(row | ({"of_brevitas": seconds["ours"] / seconds["brevitas"]} if "brevitas" in seconds else {}))
    return rows


HEADS = ("network", "layout", "float or published, ms", "Brevitas, ms", "ours, ms", "ours / first", "aimed at", "ours / Brevitas")


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows as docs/training.md shows them."""
    shown = Table(*HEADS, title=title)

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        seconds = {way: 1e3 * value for way, value in row["seconds"].items()}
        times = [number(seconds.get(way), ".1f") for way in (row["over"], "brevitas", "ours")]
        shown.add_row(row["network"], row["layout"], *times, *(number(row.get(k), ".2f") for k in ("ratio", "target", "of_brevitas")))
    return shown


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(argv)
    names, console = given.networks.split(","), Console(width=140)
    rows = measure(names, given.rounds)
    console.print(table(rows, f"a training step, one thread, medians of {given.rounds} in CPU time, torch {torch.__version__}"))
    if torch.cuda.is_available():
        for compiled in (False, True):
            there = measure(names, given.rounds, "cuda", compiled)
            how = "torch.compile" if compiled else "eager"
            console.print(table(there, f"the same on {torch.cuda.get_device_name()}, {how}"))
            rows += there
    return rows


if __name__ == "__main__":
    main()
