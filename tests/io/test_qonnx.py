"""QONNX files: nodes and numbers of stock Brevitas layers, codes of our models in QONNX' own executor, errors that name a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brevitas import nn as qnn
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.inject.enum import FloatToIntImplType, RestrictValueType
from brevitas.quant import (
    Int8ActPerTensorFloatMinMaxInit,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    SignedBinaryWeightPerTensorConst,
    Uint8ActPerTensorFloatMaxInit,
)
from torch import Tensor, nn

import zoo
from quantlib.io import qonnx
from quantlib.layers import (
    BinaryConv2d,
    FractionalConv2d,
    HalfWave,
    LearnedScaleReLU,
    QuantSign,
    ScaledIntConv2d,
    SharedHardTanh,
    Shift2d,
    TanhConv2d,
    TruncAvgPool,
)
from quantlib.quantizers import (
    BinaryWeight,
    IntActLearnedLog2Scale,
    NarrowIntWeightPerChannelMaxAbs,
    NarrowIntWeightPerTensorMaxAbs,
    UintActLearnedLog2Scale,
)

onnx = pytest.importorskip("onnx", reason="QONNX files need the packages of the extra `onnx`")
pytest.importorskip("onnxoptimizer", reason="QONNX files need the packages of the extra `onnx`")


def log2(stock: type) -> type:
    """A stock activation quantizer with the scale of ours: learned in the log2 domain, no less than 2e-16."""
    more = {"restrict_scaling_type": RestrictValueType.LOG_FP, "restrict_threshold_impl": FloatRestrictValue, "scaling_min_val": 2e-16}
    return type(stock.__name__, (stock,), more)


def floored(stock: type) -> type:
    return type(stock.__name__, (stock,), {"scaling_min_val": 2e-16})


def sequence(weight: Any, act: Callable[[], nn.Module], bits: int) -> nn.Module:
    torch.manual_seed(0)
    options = {"weight_quant": weight} | ({} if bits == 1 else {"weight_bit_width": bits})
    return nn.Sequential(
        qnn.QuantConv2d(3, 4, 3, bias=False, **options),
        nn.BatchNorm2d(4),
        act(),
        qnn.QuantConv2d(4, 4, 3, groups=4, bias=False, **options),
        nn.BatchNorm2d(4),
        act(),
        nn.Flatten(),
        qnn.QuantLinear(64, 5, bias=True, **options),
    ).eval()


PER_CHANNEL = {"scaling_per_output_channel": True, "per_channel_broadcastable_shape": (1, 4, 1, 1)}
Act = Callable[[], nn.Module]


def relu(quantizer: type, **options: Any) -> Act:
    return lambda: qnn.QuantReLU(act_quant=quantizer, bit_width=4, max_val=6.0, **options)


def hard_tanh(quantizer: type, **options: Any) -> Act:
    return lambda: qnn.QuantHardTanh(act_quant=quantizer, bit_width=4, min_val=-3.0, max_val=3.0, **options)


STOCK_RELU, STOCK_TANH = log2(Uint8ActPerTensorFloatMaxInit), log2(Int8ActPerTensorFloatMinMaxInit)
STOCK_CHANNEL, STOCK_TENSOR = floored(Int8WeightPerChannelFloat), floored(Int8WeightPerTensorFloat)
BINARY = type("Binary", (SignedBinaryWeightPerTensorConst,), {"scaling_const": 1.0})
FAMILIES: dict[str, tuple[Any, Act, Any, Act, int]] = {  # ours: weights, activations; stock: weights, activations; weight bits
    "max-abs per channel": (NarrowIntWeightPerChannelMaxAbs, relu(UintActLearnedLog2Scale), STOCK_CHANNEL, relu(STOCK_RELU), 4),
    "max-abs per tensor": (NarrowIntWeightPerTensorMaxAbs, relu(UintActLearnedLog2Scale), STOCK_TENSOR, relu(STOCK_RELU), 2),
    "ReLU per channel": (
        NarrowIntWeightPerChannelMaxAbs, relu(UintActLearnedLog2Scale, **PER_CHANNEL), STOCK_CHANNEL, relu(STOCK_RELU, **PER_CHANNEL), 8,
    ),
    "hardtanh": (NarrowIntWeightPerChannelMaxAbs, hard_tanh(IntActLearnedLog2Scale), STOCK_CHANNEL, hard_tanh(STOCK_TANH), 3),
    "binary": (BinaryWeight, relu(UintActLearnedLog2Scale), BINARY, relu(STOCK_RELU), 1),
}  # fmt: skip


def written(graph: Any) -> tuple[list[Any], dict[str, Any]]:
    """(every node with its wires and attributes, every initializer with its dtype, shape and bits).

    A single number is () here: stock binary weights hold their scale of 1 as a tensor of shape (1,), all others as ().
    """
    nodes = [(n.op_type, n.domain, n.name, tuple(n.input), tuple(n.output), sorted(map(str, n.attribute))) for n in graph.graph.node]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    return nodes, {k: (a.dtype, a.shape if a.size > 1 else (), a.tobytes()) for k, a in arrays.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_brevitas_own_export_gives_the_nodes_and_numbers_of_stock_layers(family: str) -> None:
    from brevitas.export import export_qonnx

    weight, act, stock_weight, stock_act, bits = FAMILIES[family]
    ours, stock = sequence(weight, act, bits), sequence(stock_weight, stock_act, bits)
    stock.load_state_dict(ours.state_dict())
    x = torch.zeros(1, 3, 8, 8)
    a, b = (written(export_qonnx(m, x, opset_version=13, dynamo=False)) for m in (ours, stock))
    assert a == b
    kinds = [kind for kind, *_ in a[0]]
    assert kinds.count("BipolarQuant" if bits == 1 else "Quant") == (3 if bits == 1 else 5) and kinds.count("Conv") == 2


def test_a_shared_hardtanh_and_a_deep_copy_export_like_stock_layers() -> None:
    """One module at three places, in a copy: handlers find the proxy of ours there too."""
    import copy

    from brevitas.export import export_qonnx

    class Residual(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.act, self.conv = act, qnn.QuantConv2d(3, 3, 3, padding=1, weight_quant=STOCK_CHANNEL, weight_bit_width=4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(x)
            return self.act(x + self.act(self.conv(x)))

    options = {"bit_width": 4, "min_val": -8.0, "max_val": 8.0}
    ours = Residual(SharedHardTanh(4, init=8.0)).eval()
    stock = Residual(qnn.QuantHardTanh(act_quant=STOCK_TANH, **options)).eval()
    stock.load_state_dict(ours.state_dict())
    x = torch.zeros(1, 3, 6, 6)
    graphs = [written(export_qonnx(m, x, opset_version=13, dynamo=False)) for m in (ours, copy.deepcopy(ours), stock)]
    assert graphs[0] == graphs[1] == graphs[2]
    assert [kind for kind, *_ in graphs[0][0]].count("Quant") == 4


# --- the file in QONNX' own executor ---------------------------------------------------------------------------------------------------


def executed(path: Path, x: Tensor) -> dict[str, np.ndarray]:
    """Every tensor of the file's graph, by QONNX' executor."""
    pytest.importorskip("qonnx", reason="running QONNX files needs the packages of the extra `onnx`")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    wrapper = ModelWrapper(str(path)).transform(InferShapes())
    return execute_onnx(wrapper, {"input": x.numpy()}, return_full_exec_context=True)


class Small(nn.Module):
    """Each kind of quantizer once: image, per channel, shared at a join, truncating pool, shift, signs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ScaledIntConv2d(3, 6, 3, padding=1, bits=4), nn.BatchNorm2d(6))
        self.wide = nn.Sequential(LearnedScaleReLU(4, channels=6), ScaledIntConv2d(6, 6, 3, padding=1, groups=6, bits=5), nn.BatchNorm2d(6))
        self.shared = SharedHardTanh(4, init=4.0)
        self.body = nn.Sequential(Shift2d(6), TanhConv2d(6, 6, 1, bits=3), nn.BatchNorm2d(6))
        self.relu = LearnedScaleReLU(3, init=3.0, return_quant_tensor=True)
        self.pool, self.norm, self.sign = TruncAvgPool(3, 2, return_quant_tensor=False), nn.BatchNorm2d(6), QuantSign(2)
        self.gated, self.last = FractionalConv2d(6, 4, 2), BinaryConv2d(4, 3, 2)
        self.wave = HalfWave(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.wide(self.stem(x)))
        x = self.shared.add(x, self.body(x))
        x = self.gated(self.sign(self.norm(self.pool(self.relu(x)))))
        return self.last(self.wave(x)).flatten(1)


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with normalisations of no round numbers, so that no value lies on a tie of a quantizer."""
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            with torch.no_grad():
                m.running_mean.normal_(0, 0.2, generator=generator)
                m.running_var.uniform_(0.3, 1.5, generator=generator)
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def test_the_executor_gives_the_codes_of_the_model_and_of_its_integers(tmp_path: Path) -> None:
    import quantlib as ql
    from quantlib import evaluator

    model, x = settled(Small()), torch.randint(0, 256, (2, 3, 9, 9))
    real = x.float() / 256
    graph = qonnx.export(model, tmp_path / "small.onnx", (3, 9, 9), batch=2)
    assert onnx.load(tmp_path / "small.onnx") == graph and [v.name for v in graph.graph.input] == ["input"]
    tensors = executed(tmp_path / "small.onnx", real)

    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    theirs = []  # codes at every activation quantizer, in the order of the graph
    for node in graph.graph.node:
        if node.op_type == "Quant" and node.input[0] not in constants:
            scale, zero_point = constants[node.input[1]], constants[node.input[2]]
            theirs.append(np.rint(tensors[node.output[0]] / scale + zero_point))
    ours: list[np.ndarray] = []

    def keep(module: nn.Module, _: Any, y: Any) -> None:
        scale, zero_point = module.act_quant.scale(), module.act_quant.zero_point()  # type: ignore[operator, union-attr]
        ours.append((getattr(y, "value", y) / scale + zero_point).round().detach().numpy())

    for m in model.modules():
        if hasattr(m, "act_quant") and m.act_quant.is_quant_enabled:
            m.register_forward_hook(keep)
    with torch.no_grad():
        y = model(real)
    assert len(ours) == len(theirs) == 7
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))  # equal although sums differ in the last bits: no value is on a tie

    # sums of at most 24 products of float32 in another order
    assert np.allclose(tensors["output"], y.numpy(), rtol=0, atol=1e-5 * float(y.abs().max()))
    integers = ql.convert(model, (3, 9, 9), input=ql.Grid(0, 255, 1 / 256))
    assert np.allclose(ql.run(integers, x).numpy(), tensors["output"], rtol=0, atol=1e-5 * float(y.abs().max()))  # likewise
    assert "Conv2d" in " ".join(type(n.op).__name__ for n in integers) and evaluator.engine(integers)


def compare(name: str, options: dict[str, Any], path: Path) -> None:
    card = zoo.card(name)
    torch.manual_seed(0)
    model, shape = settled(zoo.get(name, **options)), card.convert_shape or card.input_shape
    graph = qonnx.export(model, path, shape)
    assert not {n.domain for n in graph.graph.node} - {"", "qonnx.custom_op.general"}
    x = torch.randint(0, 256, (1, *shape)).float() / 256
    with torch.no_grad():
        y = model(x)
    y = getattr(y, "value", y).numpy()
    # two float32 implementations of the same convolutions; a code that fell to the other side would be off by far more
    assert np.allclose(executed(path, x)["output"], y, rtol=0, atol=1e-5 * max(1.0, float(np.abs(y).max())))


QUICK = ("diracdeltanet_imagenet", "fracbnn_digits", "proxylessnas_4b5b_imagenet", "ultranet_bypass_dacsdc")


@pytest.mark.parametrize("name", QUICK)
def test_zoo_networks(name: str, tmp_path: Path) -> None:
    compare(name, dict(zoo.card(name).converts[0]), tmp_path / "network.onnx")


REST = [(n, o) for n in zoo.names() for o in zoo.card(n).converts if n not in QUICK and "authors" not in o.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", REST, ids=lambda v: v if isinstance(v, str) else "")
def test_every_quantized_zoo_network(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    compare(name, dict(options), tmp_path / "network.onnx")


# --- what has no faithful form -----------------------------------------------------------------------------------------------------------


def refuses(model: nn.Module, shape: tuple[int, ...], message: str, folder: Path) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(qonnx.QonnxError, match=message):
        qonnx.export(model, folder / "never.onnx", shape)
    assert not list(folder.iterdir())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_that_a_quantizer_transforms_are_stored_quantized(tmp_path: Path) -> None:
    model = nn.Sequential(QuantSign(2), TanhConv2d(3, 4, 3, bits=4)).eval()
    graph = qonnx.export(model, tmp_path / "tanh.onnx", (3, 5, 5))
    (stored,) = [onnx.numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == "1.weight"]
    assert np.array_equal(stored, model[1].quant_weight().value.detach().numpy())
    assert not np.array_equal(stored, model[1].weight.detach().numpy())


def test_a_weight_of_zero_has_no_bipolar_code(tmp_path: Path) -> None:
    model = nn.Sequential(QuantSign(2), BinaryConv2d(3, 4, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = 0.0
    refuses(model, (3, 5, 5), r"1\.weight: its integers are -1\.\.1, which BipolarQuant of 1 bit.* sign_of_zero=1", tmp_path)


def test_another_rounding_is_named(tmp_path: Path) -> None:
    act = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloatMaxInit, bit_width=3, max_val=6.0, float_to_int_impl_type=FloatToIntImplType.FLOOR)
    refuses(nn.Sequential(nn.Conv2d(3, 4, 3), act), (3, 5, 5), r"^1: at .* another code than a Quant node", tmp_path)


def test_a_layer_without_an_operator_is_named(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            y[:, :1] = x[:, :1]
            return y

    refuses(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Writes())), (3, 5, 5), r"^1\.0 has no ONNX form: it writes into a part", tmp_path
    )
    authors = zoo.get("fracbnn_cifar10", fixed_point="authors")
    refuses(authors, (3, 32, 32), r"^layer1\.0\.conv1 has no ONNX form: it convolves in float64", tmp_path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qonnx, "NEEDS", ("onnx", "no_such_package"))
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install 'quantlib-fpga\[onnx\]'"):
        qonnx.export(nn.Conv2d(1, 1, 1), tmp_path / "never.onnx", (1, 2, 2))


def test_an_average_keeps_its_divisor(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.trunc(nn.functional.avg_pool2d(x, 2, divisor_override=1))

    x = torch.arange(-8.0, 8.0).reshape(1, 1, 4, 4) / 4
    qonnx.export(Sums(), tmp_path / "sums.onnx", (1, 4, 4))
    assert np.array_equal(executed(tmp_path / "sums.onnx", x)["output"], Sums()(x).numpy())
