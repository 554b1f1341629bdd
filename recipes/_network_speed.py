"""How fast one network is in every way that there is of running it, and what conversion, export and compilation cost.

`measure` builds a network, converts and exports it with the clock running, then lets the ways take turns, round after round, so that their
ratios hold although the machine is shared. It belongs into a process of its own, because peak memory is the process's.
"""

from __future__ import annotations

import copy
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brevitas import nn as qnn
from brevitas.quant import (
    Int8WeightPerTensorFixedPoint,
    Int8WeightPerTensorFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib import evaluator
from quantlib._modules import replace_module
from quantlib.hls import ExportError
from quantlib.layers import FixedPoint, FractionalConv2d, LearnedScaleReLU, ScaledIntConv2d, ScaledIntLinear, TruncAvgPool

Shape = tuple[int, ...]


# --- networks ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a plain network is made of: (inputs, outputs, options of a convolution) -> layer, (inputs, outputs) -> layer, activation."""

    conv: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    act: Callable[[], nn.Module]


def signs() -> Kind:
    """Weights and activations of one bit, in Brevitas' layers."""
    weights = {"weight_quant": SignedBinaryWeightPerTensorConst, "weight_scaling_const": 1.0, "bias": False}
    act = partial(qnn.QuantIdentity, act_quant=SignedBinaryActPerTensorConst, scaling_const=1.0)
    return Kind(partial(qnn.QuantConv2d, **weights), partial(qnn.QuantLinear, **weights), act)


def brevitas(bits: int) -> Kind:
    """Brevitas' integer weights and unsigned activations."""
    weights = {"weight_quant": Int8WeightPerTensorFloat, "weight_bit_width": bits, "bias": False}
    act = partial(qnn.QuantReLU, act_quant=Uint8ActPerTensorFloat, bit_width=bits)
    return Kind(partial(qnn.QuantConv2d, **weights), partial(qnn.QuantLinear, **weights), act)


def ours(bits: int) -> Kind:
    """Max-abs weights and activations of a learned scale."""
    return Kind(
        partial(ScaledIntConv2d, bits=bits), partial(ScaledIntLinear, bits=bits, bias=False), partial(LearnedScaleReLU, bits, init=4.0)
    )


def plain(
    kind: Kind, channels: Sequence[int], shape: Shape, pools: Sequence[int] = (), dense: Sequence[int] = (), padding: int = 0
) -> nn.Module:
    """3x3 convolutions of these widths with a normalisation and an activation each, a pool after those numbered, dense layers, ten outputs.

    Image (3, H, W) in 0..1, 8 bits.
    """
    layers: list[nn.Module] = [qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat)]
    before, side = shape[0], shape[1]
    for n, width in enumerate(channels):
        layers += [kind.conv(before, width, 3, padding=padding), nn.BatchNorm2d(width), kind.act()]
        before, side = width, side + 2 * padding - 2
        if n in pools:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    layers.append(nn.Flatten())
    before *= side * side
    for width in dense:
        layers += [kind.linear(before, width), nn.BatchNorm1d(width), kind.act()]
        before = width
    layers.append(kind.linear(before, 10))
    return settled(nn.Sequential(*layers), shape)


def settled(model: nn.Module, shape: Shape) -> nn.Module:
    """In eval mode, after a few batches on which Brevitas' activation scales and the normalisations settle."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.rand(8, *shape))
    return model.eval()


def cnv(bits: int) -> nn.Module:
    """FINN's CNV for CIFAR-10 (arXiv 1612.07119), 59.5 M MAC: six unpadded convolutions, two pools, three dense layers."""
    kind = signs() if bits == 1 else brevitas(bits)
    return plain(kind, (64, 64, 128, 128, 256, 256), (3, 32, 32), pools=(1, 3), dense=(512, 512))


def powers() -> nn.Module:
    """A small network all of whose scales are powers of two and without normalisations, as flows of fixed-point numbers want it."""

    def conv(before: int, width: int) -> list[nn.Module]:
        weights = {"weight_quant": Int8WeightPerTensorFixedPoint, "weight_bit_width": 4}
        return [
            qnn.QuantConv2d(before, width, 3, bias=False, **weights),
            qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=4),
        ]

    last = qnn.QuantLinear(256, 10, bias=False, weight_quant=Int8WeightPerTensorFixedPoint, weight_bit_width=4)
    first = qnn.QuantIdentity(act_quant=Uint8ActPerTensorFixedPoint)
    return settled(nn.Sequential(first, *conv(3, 8), *conv(8, 8), nn.MaxPool2d(2), *conv(8, 16), nn.Flatten(), last), (3, 16, 16))


@dataclass(frozen=True)
class Case:
    """A network to measure, how many images each way gets in a round, and which of the slow things are done with it."""

    build: Callable[[], nn.Module]
    shape: Shape
    images: int
    few: int  # of csim and of peers
    peers: tuple[str, ...] = ()
    csim: bool = True
    quick: bool = False


def _zoo(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = zoo.get(name, **options)
        with torch.no_grad():
            for p in model.parameters():
                p[p == 0] = 1e-3  # of millions of random weights some are exactly 0, which has no sign
        return model.eval()

    return build


DELTA = dict.fromkeys(("first_weight_bits", "first_act_bits", "last_weight_bits", "last_act_bits", "fc_weight_bits"), 8)
ALL = ("qonnx", "onnxruntime", "hls4ml")
CASES: dict[str, Case] = {
    "fracbnn_digits": Case(_zoo("fracbnn_digits"), (1, 8, 8), 64, 16, ("qonnx", "onnxruntime"), quick=True),
    "powers_of_two": Case(powers, (3, 16, 16), 64, 16, ALL, quick=True),
    "cnv_1bit": Case(lambda: cnv(1), (3, 32, 32), 32, 4, ("qonnx", "onnxruntime")),
    "cnv_2bit": Case(lambda: cnv(2), (3, 32, 32), 32, 4, ("qonnx", "onnxruntime"), quick=True),
    "fracbnn_cifar10": Case(_zoo("fracbnn_cifar10", fixed_point=FixedPoint(12, 6)), (3, 32, 32), 32, 1, ("qonnx",)),
    "vggtiny_cifar10": Case(_zoo("vggtiny_cifar10"), (3, 32, 32), 32, 4),
    "ultranet_dacsdc": Case(_zoo("ultranet_dacsdc"), (3, 160, 320), 4, 1),
    "diracdeltanet_imagenet": Case(
        _zoo("diracdeltanet_imagenet", weight_bits=4, act_bits=4, image="int8", **DELTA), (3, 224, 224), 4, 1, csim=False
    ),
    "mobilenet_v1_imagenet": Case(_zoo("mobilenet_v1_imagenet", weight_bits=4, act_bits=4), (3, 224, 224), 4, 1, csim=False),
    "proxylessnas_4b5b_imagenet": Case(_zoo("proxylessnas_4b5b_imagenet"), (3, 224, 224), 4, 1),
    "fracbnn_imagenet": Case(_zoo("fracbnn_imagenet", fixed_point=FixedPoint(14, 6)), (3, 224, 224), 4, 1),
}
IMAGENET = tuple(name for name in CASES if name.endswith("_imagenet"))


def floats(model: nn.Module, shape: Shape) -> nn.Module | None:
    """The same layers without their quantizers, gated convolutions as plain ones; None where it does not run so."""
    twin = nn.ModuleList([copy.deepcopy(model)])
    for name, m in list(twin.named_modules()):
        if isinstance(m, FractionalConv2d):
            made = nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, bias=False)  # type: ignore[arg-type]
            replace_module(twin, name, made)
        elif isinstance(m, TruncAvgPool):
            replace_module(twin, name, nn.AvgPool2d(m.kernel_size, m.stride, m.padding))
    for m in twin.modules():
        if hasattr(m, "disable_quant"):
            m.disable_quant = True  # type: ignore[assignment]
    try:
        with torch.no_grad():
            twin.eval()[0](torch.zeros(1, *shape))
    except Exception:  # any layer may need the scale or the grid that is gone
        return None
    return twin[0]


# --- peers ---------------------------------------------------------------------------------------------------------------------------


def qonnx_peer(model: nn.Module, x: Tensor, folder: Path) -> tuple[Callable[[], Any], str]:
    """QONNX' own executor on our QONNX file, node by node."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    from quantlib.io import qonnx

    qonnx.export(model, folder / "network.onnx", tuple(x.shape[1:]), batch=len(x))
    wrapper, inputs = ModelWrapper(str(folder / "network.onnx")).transform(InferShapes()), {"input": x.numpy()}
    return lambda: execute_onnx(wrapper, inputs)["output"], ""


def onnxruntime_peer(model: nn.Module, x: Tensor, folder: Path) -> tuple[Callable[[], Any], str]:
    """onnxruntime on Brevitas' QCDQ file: quantize, clip and dequantize nodes of ONNX."""
    import onnxruntime
    from brevitas.export import export_onnx_qcdq

    path = str(folder / "qcdq.onnx")
    with torch.no_grad():
        export_onnx_qcdq(copy.deepcopy(model), x, path, opset_version=13, dynamo=False, keep_initializers_as_inputs=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)[0], ""


def hls4ml_peer(model: nn.Module, x: Tensor, folder: Path) -> tuple[Callable[[], Any], str]:
    """hls4ml's C simulation (Vitis backend, io_stream) of our QONNX file."""
    import hls4ml
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    from quantlib.io import qonnx

    qonnx.export(model, folder / "one.onnx", tuple(x.shape[1:]))
    wrapper = cleanup_model(ModelWrapper(str(folder / "one.onnx"))).transform(ConvertToChannelsLastAndClean()).transform(GemmToMatMul())
    wrapper, kind = cleanup_model(wrapper), {"backend": "Vitis"}
    config = hls4ml.utils.config_from_onnx_model(wrapper, granularity="name", default_precision="fixed<24,10>", **kind)
    made = hls4ml.converters.convert_from_onnx_model(
        wrapper, output_dir=str(folder / "hls4ml"), io_type="io_stream", hls_config=config, **kind
    )
    seconds, _ = timed(made.compile)
    images = x.numpy()
    return lambda: made.predict(images), f"compiled in {seconds:.1f} s"


PEERS: dict[str, Callable[[nn.Module, Tensor, Path], tuple[Callable[[], Any], str]]] = {
    "qonnx": qonnx_peer,
    "onnxruntime": onnxruntime_peer,
    "hls4ml": hls4ml_peer,
}


# --- measuring -----------------------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def peak() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def engine(choice: str, threads: int = 1) -> Iterator[None]:
    before, count = os.environ.get("QUANTLIB_ENGINE"), torch.get_num_threads()
    os.environ["QUANTLIB_ENGINE"] = choice
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        os.environ.pop("QUANTLIB_ENGINE")
        if before is not None:
            os.environ["QUANTLIB_ENGINE"] = before


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int, most: float) -> dict[str, list[float]]:
    """Seconds of each call, in turns, after a first call each that is not counted; of a way whose first call took more than `most` seconds
    that call is all."""
    first = {way: timed(function)[0] for way, function in ways.items()}
    seconds: dict[str, list[float]] = {way: [s] if s > most else [] for way, s in first.items()}
    for _ in range(rounds):
        for way, function in ways.items():
            if first[way] <= most:
                seconds[way].append(timed(function)[0])
    return seconds


def measure(name: str, folder: Path, rounds: int, sections: Sequence[str], most: float = 8.0) -> dict[str, Any]:
    """Everything about one network, as plain numbers: seconds, MB, images per second by way, and their spread, largest over smallest."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"network": name, "input": case.shape, "memory_start": peak()}
    model = case.build().eval()
    row["weights_mb"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    row["memory_model"] = peak()
    row["convert_seconds"], graph = timed(lambda: ql.convert(model, case.shape))
    row["memory_convert"] = peak()
    if "conversion" in sections or "csim" in sections:
        row["estimate_seconds"], plan = timed(lambda: ql.estimate(graph, "xczu3eg"))
        row["export_seconds"], hls = timed(lambda: ql.export(graph, folder / "project", plan=plan))
        row["memory_export"], row["cycles"], row["fits"] = peak(), plan.cycles, plan.fits

    codes, x = images(graph, case.images)
    few = codes[: case.few]
    ways: dict[str, tuple[int, Callable[[], Any]]] = {}
    notes: dict[str, str] = {}
    if "inference" in sections:
        twin = floats(model, case.shape)
        if twin is not None:
            ways["float"] = len(x), lambda: twin(x)
        ways["fake-quantized"] = len(x), lambda: model(x)

        def run(choice: str, threads: int) -> Callable[[], Any]:
            def call() -> Any:
                with engine(choice, threads):
                    return ql.run(graph, codes)

            return call

        for choice in ("native", "portable", "torch"):
            ways[f"run, {choice}"] = len(x), run(choice, 1)
        cores = os.cpu_count() or 1
        if cores > 1:
            ways[f"run, native, {cores} threads"] = len(x), run("native", cores)
        with engine("native"):
            row["engine"] = evaluator.engine(graph)
    if "csim" in sections and case.csim:
        try:
            row["compile_seconds"] = timed(lambda: hls.csim(few[:1]))[0]
            ways["csim, fast"] = len(few), lambda: hls.csim(few)
        except ExportError as error:  # no compiler
            notes["csim"] = str(error).splitlines()[0]
    if "peers" in sections:
        for peer in case.peers:
            try:
                function, note = PEERS[peer](model, x[: case.few], folder)
                ways[peer] = case.few, _checked(function, model(x[: case.few]))
                notes[peer] = note
            except ModuleNotFoundError as error:
                notes[peer] = f"absent: {error.name} is not installed"
            except Exception as error:  # a peer refuses a network in its own ways; the reason is reported
                notes[peer] = f"does not run it: {(str(error) or type(error).__name__).splitlines()[0][:160]}"
    with torch.no_grad():
        seconds = interleaved({way: function for way, (_, function) in ways.items()}, rounds, most)
    row["images_per_second"] = {way: ways[way][0] / statistics.median(values) for way, values in seconds.items()}
    row["spread"] = {way: max(values) / min(values) for way, values in seconds.items()}
    row["notes"], row["memory_peak"] = notes, peak()
    return row


def _checked(function: Callable[[], Any], wanted: Tensor) -> Callable[[], Any]:
    """The function, after one call whose result must have the model's shape."""
    got = np.asarray(function())
    if got.size != wanted.numel():
        raise ValueError(f"it gives {got.shape}, the model {tuple(wanted.shape)}")
    return function


def images(graph: Any, count: int) -> tuple[Tensor, Tensor]:
    """Random codes on the network's input grid, as bytes where they fit, and the real numbers they stand for."""
    t = graph.input.type
    codes = t.lo + t.step * torch.randint(0, (t.hi - t.lo) // t.step + 1, (count, *t.shape))
    real = (codes.double() * torch.tensor(np.asarray(t.scale), dtype=torch.float64)).float()
    return (codes.to(torch.uint8) if (t.lo, t.hi) == (0, 255) else codes), real
