"""What convert, run and verify refuse, and that each message names the place in the user's model and what would work."""

from __future__ import annotations

import re

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantlib as ql
from quantlib.capture import CaptureError
from quantlib.evaluator import InputError
from quantlib.layers import FixedPoint
from quantlib.verification import VerifyError


def identity(bits: int = 8) -> nn.Module:
    return qnn.QuantIdentity(bit_width=bits, return_quant_tensor=True)


def conv(i: int, o: int, k: int = 3, **options: object) -> nn.Module:
    return qnn.QuantConv2d(i, o, k, **{"padding": k // 2, "bias": False, "weight_bit_width": 4, **options})


def ready(model: nn.Module, *shape: int) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, *shape))
    return model.eval()


def refused(model: nn.Module, shape: tuple[int, ...], *words: str, input: ql.Grid | None = None) -> str:
    """convert refuses, with every word in the message."""
    with pytest.raises(ValueError) as caught:
        ql.convert(ready(model, *shape), shape, input)
    assert isinstance(caught.value, ql.ConversionError | CaptureError), repr(caught.value)
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    return message


class Body(nn.Module):
    """identity - conv - the step under test - relu - conv."""

    def __init__(self, step: object = None, channels: int = 4):
        super().__init__()
        self.q, self.c = identity(), conv(3, channels)
        self.r, self.head = qnn.QuantReLU(bit_width=4, return_quant_tensor=True), conv(channels, 2)
        self.step = step if isinstance(step, nn.Module) else None
        self.function = None if isinstance(step, nn.Module) else step

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.q(x))
        x = self.step(x) if self.step is not None else self.function(x)
        return self.head(self.r(x))


SHAPE = (3, 6, 6)

# ---------------------------------------------------------------- modules and functions without integers


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.GroupNorm(2, 4), ["step", "GroupNorm", "Supported", "batch norm"]),
        (nn.LayerNorm(6), ["step", "LayerNorm", "lower"]),
        (nn.Softmax(1), ["step", "Softmax", "Supported"]),
        (nn.InstanceNorm2d(4), ["step", "InstanceNorm2d", "QuantReLU"]),
        (nn.LocalResponseNorm(2), ["step", "LocalResponseNorm"]),
        (nn.ConvTranspose2d(4, 4, 2), ["step", "ConvTranspose2d", "Supported"]),
        (nn.Conv2d(4, 4, 3, padding=1), ["step", "accumulator|real|integers"]),
        (nn.MaxPool2d(2, return_indices=True), ["step", "return_indices|tensor|tuple"]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_unsupported_module(module: nn.Module, words: list[str]) -> None:
    if isinstance(module, nn.MaxPool2d):
        refused(Body(lambda x: module(x)[0]), SHAPE, "return_indices")
    else:
        refused(Body(module), SHAPE, *words)


def test_unsupported_module_deep_inside_is_named_by_its_dotted_path() -> None:
    refused(
        nn.Sequential(identity(), nn.ModuleDict({"a": nn.Identity()})["a"], Body(nn.Sequential(nn.ReLU(), nn.LayerNorm(6)))),
        SHAPE,
        r"2\.step\.1",
        "LayerNorm",
    )


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.softmax(x, 1), ["softmax", "test_bad_input.py:\\d+", "Supported"]),
        (lambda x: torch.fft.fft(x).real, ["fft", "test_bad_input"]),
        (lambda x: x.cumsum(1), ["cumsum", "elementwise"]),
        (lambda x: torch.sort(x, dim=1)[0], ["sort"]),
        (lambda x: F.instance_norm(x), ["instance_norm"]),
        (lambda x: x @ x.transpose(2, 3), ["matmul", "test_bad_input"]),
        (lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1), ["mean", "spatial"]),
        (lambda x: x.mean(3, keepdim=True).expand(-1, -1, -1, 6), ["mean", "spatial"]),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), ["bilinear", "nearest"]),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), ["reflect", "zero"]),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=0.5), ["0.5", "zero"]),
        (lambda x: x[torch.arange(x.shape[0]).flip(0)], ["batch|differs|recordings"]),
        (lambda x: x.flip(0), ["batch axis"]),
        (lambda x: x + x.mean(0, keepdim=True), ["mean|batch"]),
    ],
)
def test_unsupported_function(function: object, words: list[str]) -> None:
    refused(Body(function), SHAPE, *words)


# ---------------------------------------------------------------- data-dependent Python and writes in place


def branch(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def loop(x: Tensor) -> Tensor:
    for _ in range(int(x.abs().max())):
        x = x + 1
    return x


def write_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def write_view(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].zero_()
    return y


def write_through_alias(x: Tensor) -> Tensor:
    y = x.clone()
    z = y.view(-1)
    z += 1
    return y


def into_zeros(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :2] = x[:, :2]
    return y


def out_argument(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    torch.add(x, 1, out=y)
    return y


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.maximum(x.detach().numpy(), 0))


def mask(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


def masked_fill(x: Tensor) -> Tensor:
    return x.masked_fill_(x < 0, 0.0)


def noise(x: Tensor) -> Tensor:
    return x + torch.rand(1, dtype=x.dtype)


def statistics(x: Tensor) -> Tensor:
    return x / float(x.detach().abs().max())


def batch_branch(x: Tensor) -> Tensor:
    return torch.relu(x) if x.shape[0] > 2 else x


def batch_number(x: Tensor) -> Tensor:
    return x * x.shape[0]


def as_list(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist(), dtype=x.dtype)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (branch, ["x \\* 2 if x.sum\\(\\) > 0 else x", "depends on the data|Python value"]),
        (loop, ["int\\(x.abs\\(\\).max\\(\\)\\)", "Python value"]),
        (write_slice, ["y\\[:, 0\\] = 0", "in place", "new tensor"]),
        (write_view, ["in place|writ"]),
        (write_through_alias, ["in place|writ|record"]),
        (into_zeros, ["in place", "into_zeros|y\\[:, :2\\]"]),
        (out_argument, ["out|in place|record|output"]),
        (through_numpy, ["numpy", "test_bad_input.py:\\d+"]),
        (mask, ["in place|x\\[x < 0\\]"]),
        (noise, ["random"]),
        (statistics, ["Python value", "float\\(x.detach\\(\\)"]),
        (batch_branch, ["batch"]),
        (batch_number, ["batch"]),
        (as_list, ["Python value", "tolist"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_a_record_cannot_hold(function: object, words: list[str]) -> None:
    refused(Body(function), SHAPE, *words)


# ---------------------------------------------------------------- what depends on the other images, or on the data


def test_batch_norm_on_the_statistics_of_the_batch() -> None:
    refused(Body(nn.BatchNorm2d(4, track_running_stats=False)), SHAPE, "^step", "running statistics", "track_running_stats")
    refused(Body(lambda x: F.batch_norm(x, None, None, training=True)), SHAPE, "batch_norm", "other images")
    refused(
        Body(lambda x: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x), None, None, True)), SHAPE, "other images|in place|record"
    )


def test_a_quantizer_whose_scale_comes_from_the_data() -> None:
    from brevitas_examples.common.generative.quantizers import Int8DynamicActPerTensorFloat

    refused(Body(qnn.QuantIdentity(act_quant=Int8DynamicActPerTensorFloat)), SHAPE, "^step", "from the data", "learned or constant")


def test_minifloat_quantizers() -> None:
    from brevitas.quant.experimental.float import Fp8e4m3ActPerTensorFloat

    refused(Body(qnn.QuantIdentity(act_quant=Fp8e4m3ActPerTensorFloat)), SHAPE, "^step", "FloatQuantTensor", "minifloat")


def test_hooks_that_change_a_layer() -> None:
    for register, hook in (("register_forward_hook", lambda m, a, y: y * 2), ("register_forward_pre_hook", lambda m, a: (a[0] * 2,))):
        model = Body(nn.ReLU())
        getattr(model.c, register)(hook)
        refused(model, SHAPE, "^c ", "hook", "step of the model")


class Offset(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def test_constants_that_change_inside_a_channel() -> None:
    for shape in ((1, 4, 6, 6), (6,), (6, 1)):
        refused(Body(Offset(*shape)), SHAPE, "inside a channel", "per-channel")


def test_a_constant_with_the_rows_of_the_batch() -> None:
    refused(Body(lambda x: x + torch.zeros(x.shape[0], 4, 6, 6, dtype=x.dtype)), SHAPE, "as many rows as the batch", "broadcasts")


def test_a_padded_average_of_shifted_values() -> None:
    """The zeros of the padding are real zeros; the accumulator's integers cannot say so once an offset was added."""
    refused(Body(lambda x: F.avg_pool2d(x + 0.5, 3, 1, 1)), SHAPE, "zero padding", "without padding")


def test_an_average_of_the_real_input() -> None:
    refused(nn.Sequential(nn.AvgPool2d(2), identity(), conv(3, 2)), SHAPE, "^0", "real input", "quantizer")


def test_linear_layers_on_maps() -> None:
    refused(nn.Sequential(identity(), qnn.QuantLinear(6, 3, bias=True)), SHAPE, "^1", "flatten")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["c.weight", "r.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"])
def test_nan_and_infinity_name_the_key(key: str, value: float) -> None:
    model = ready(Body(nn.ReLU()), *SHAPE)
    with torch.no_grad():
        dict(model.named_parameters())[key].view(-1)[0] = value
    with pytest.raises(CaptureError, match=re.escape(key)) as caught:
        ql.convert(model, SHAPE)
    assert "checkpoint" in str(caught.value)


def test_nan_in_batch_norm_statistics() -> None:
    model = ready(Body(nn.BatchNorm2d(4)), *SHAPE)
    model.step.running_var[2] = float("nan")
    with pytest.raises(CaptureError, match="step.running_var"):
        ql.convert(model, SHAPE)


def test_real_weights() -> None:
    message = refused(nn.Sequential(identity(), nn.Conv2d(3, 4, 3)), SHAPE, "1", "real-valued weights", "ScaledIntConv2d")
    assert "QuantConv2d" in message
    refused(nn.Sequential(identity(), nn.Flatten(), nn.Linear(108, 4)), SHAPE, "real-valued weights", "QuantLinear")
    refused(nn.Sequential(identity(), qnn.QuantConv2d(3, 4, 3, weight_quant=None)), SHAPE, "1", "weight_quant")


def test_weights_computed_from_data() -> None:
    refused(Body(lambda x: F.conv2d(x, x[:1].detach().reshape(4, 1, 6, 6)[:, :, :3, :3], groups=4)), SHAPE, "conv2d|batch|recordings")


# ---------------------------------------------------------------- joins, tails, scales


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.a, self.b = identity(), conv(3, 4), conv(3, 4, 1)
        self.n, self.r, self.head = nn.BatchNorm2d(4), qnn.QuantReLU(bit_width=4, return_quant_tensor=True), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q(x)
        return self.head(self.r(self.n(self.a(x)) + self.b(x)))


def test_real_valued_join_without_a_grid() -> None:
    message = refused(Join(), SHAPE, "^r", "different scales", "SharedHardTanh", "FixedPoint", "quantizer")
    assert "a int" in message and "b int" in message, message


def test_accumulator_used_without_a_quantizer() -> None:
    refused(nn.Sequential(identity(), conv(3, 4), nn.BatchNorm2d(4), conv(4, 4)), SHAPE, "^3", "integers", "QuantIdentity|QuantReLU")


def test_real_input() -> None:
    message = refused(nn.Sequential(conv(3, 4)), SHAPE, "^0", "real-valued input", r"ql\.Grid\(0, 255, 1 / 255\)")
    assert "QuantIdentity" in message


def test_input_quantized_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = identity(8), identity(4), conv(3, 4), conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x)) + self.d(self.b(x))

    refused(Twice(), SHAPE, "^b", "two places", r"ql\.Grid")


def test_average_of_a_nonlinear_real_value() -> None:
    message = refused(Body(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))), SHAPE, r"step\.1", "average", "quantizer")
    assert "step.0" in message


def test_many_levels_behind_a_function_that_is_not_monotone() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = qnn.QuantIdentity(bit_width=8, return_quant_tensor=True)
            self.c = qnn.QuantLinear(600, 4, bias=False, weight_bit_width=8)
            self.r = identity(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.r(torch.sin(3 * self.c(self.q(x))))

    refused(Wave(), (600,), "^r|sin", "monotone")


def test_output_behind_softmax_and_sigmoid() -> None:
    refused(nn.Sequential(identity(), conv(3, 4), nn.Sigmoid()), SHAPE, "2", "not affine", "ql.run")


def test_concat_of_different_scales_before_a_convolution() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.a, self.b, self.head = identity(), conv(3, 4), conv(3, 4), conv(8, 2)
            self.p, self.q = qnn.QuantReLU(bit_width=4), qnn.QuantReLU(bit_width=3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.i(x)
            return self.head(torch.cat([self.p(self.a(x)), self.q(self.b(x))], 1))

    message = refused(
        nn.Sequential(Cat(), qnn.QuantReLU(bit_width=4)), SHAPE, "^1: real-valued join", "0.head", "different scales", "Share one"
    )
    assert "0.cat" in message
    graph = ql.convert(Cat().eval(), SHAPE)  # at the output each scale has an accumulator of its own, and the decode adds them
    assert len(graph.outputs) == 2


def test_per_channel_scales_before_a_full_convolution() -> None:
    scale = {
        "scaling_per_output_channel": True,
        "per_channel_broadcastable_shape": (1, 4, 1, 1),
        "scaling_stats_permute_dims": (1, 0, 2, 3),
    }
    refused(
        nn.Sequential(identity(), conv(3, 4), qnn.QuantReLU(bit_width=4, **scale), conv(4, 2)), SHAPE, "^3", "different scales", "depthwise"
    )


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([conv(3, 4, padding_mode="circular")], ["^1", "circular", "F.pad|zero"]),
        ([conv(3, 4), qnn.QuantReLU(bit_width=4), nn.AvgPool2d(4, 4, ceil_mode=True)], ["^3", "ceil_mode", "evenly"]),
        ([conv(3, 4), qnn.QuantReLU(bit_width=4), nn.AvgPool2d(3, 1, 1, count_include_pad=False)], ["^3", "count_include_pad=False"]),
        ([conv(3, 4), qnn.QuantReLU(bit_width=4), nn.AdaptiveAvgPool2d(4)], ["^3", "6x6 to 4x4", "divide"]),
        ([nn.Conv1d(3, 4, 1)], ["Conv1d|does not run"]),
    ],
)
def test_layer_options(layers: list[nn.Module], words: list[str]) -> None:
    model = nn.Sequential(identity(), *layers)
    if isinstance(layers[0], nn.Conv1d):
        with pytest.raises(CaptureError, match="does not run on a float64 batch of shape \\(2, 3x6x6\\)"):
            ql.convert(model, SHAPE)
    else:
        refused(model, SHAPE, *words)


# ---------------------------------------------------------------- arguments of convert


def test_arguments_of_convert() -> None:
    model = ready(Body(nn.ReLU()), *SHAPE)
    for shape in ((), (0, 6, 6), (3, -1, 6)):
        with pytest.raises(ql.ConversionError, match="input_shape"):
            ql.convert(model, shape)
    with pytest.raises(ql.ConversionError, match="torch.nn.Module"):
        ql.convert(lambda x: x, SHAPE)
    with pytest.raises(ql.ConversionError, match=r"ql\.Grid"):
        ql.convert(model, SHAPE, (0, 255))
    with pytest.raises(CaptureError, match="does not run.*4x6x6"):
        ql.convert(model, (4, 6, 6))
    with pytest.raises(ValueError, match="positive"):
        ql.Grid(0, 255, -1.0)
    with pytest.raises(ValueError, match="empty"):
        ql.Grid(3, 2)


def test_a_batch_of_images_in_the_place_of_the_shape() -> None:
    with pytest.raises(ValueError, match="batch axis|does not run"):
        ql.convert(ready(Body(nn.ReLU()), *SHAPE), (1, 3, 6, 6))


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def on_grid() -> ql.Graph:
    torch.manual_seed(0)
    return ql.convert(ready(nn.Sequential(conv(3, 4), qnn.QuantReLU(bit_width=4), conv(4, 2)), *SHAPE), SHAPE, ql.Grid(0, 200, 1 / 200))


@pytest.fixture(scope="module")
def with_front() -> ql.Graph:
    torch.manual_seed(0)
    return ql.convert(ready(Body(nn.ReLU()), *SHAPE), SHAPE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(3, 6, 6), ["batch axis", r"\(N, 3, 6, 6\)"]),
        (lambda: torch.zeros(2, 6, 6, 3), ["channels come first"]),
        (lambda: torch.zeros(2, 3, 6, 7), [r"\(2, 3, 6, 7\)"]),
        (lambda: torch.zeros(0, 3, 6, 6), ["empty batch"]),
        (lambda: torch.zeros(2, 3, 6, 6, dtype=torch.bool), ["bool"]),
        (lambda: torch.zeros(2, 3, 6, 6, dtype=torch.complex64), ["complex"]),
        (lambda: torch.full((2, 3, 6, 6), 201), ["0..200", "201"]),
        (lambda: torch.full((2, 3, 6, 6), -1), ["0..200", "-1"]),
        (lambda: np.full((2, 3, 6, 6), 255, np.uint8), ["0..200", "255"]),
        (lambda: torch.full((2, 3, 6, 6), 0.5004), ["grid", "0.5004", "uint8"]),
        (lambda: torch.full((2, 3, 6, 6), 1.5), ["0..200", "300"]),
        (lambda: torch.full((2, 3, 6, 6), float("nan")), ["NaN"]),
        (lambda: torch.full((2, 3, 6, 6), float("inf")), ["grid|infinite"]),
        (lambda: np.full((2, 3, 6, 6), "a"), ["numpy|torch"]),
        (lambda: "image.png", ["tensor|array"]),
        (lambda: None, ["tensor|array"]),
        (lambda: np.full((2, 3, 6, 6), None), ["tensor|array"]),
        (lambda: np.full((2, 3, 6, 6), 2**63 + 5, np.uint64), ["0..200|int"]),
    ],
)
def test_images(on_grid: ql.Graph, make: object, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ql.run(on_grid, make())
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_images_for_a_model_with_its_own_input_quantizer(with_front: ql.Graph) -> None:
    with pytest.raises(InputError, match="NaN"):
        ql.run(with_front, torch.full((2, 3, 6, 6), float("nan")))
    with pytest.raises(InputError, match="-128..127|-127..127"):
        ql.run(with_front, torch.full((2, 3, 6, 6), 200))
    far = torch.full((2, 3, 6, 6), float("inf"))
    edge = torch.full((2, 3, 6, 6), 1e30)
    assert torch.equal(ql.run(with_front, far), ql.run(with_front, edge)), "infinity saturates like any large number"


def test_a_step_grid_takes_only_its_codes() -> None:
    graph = ql.convert(ready(nn.Sequential(conv(3, 2)), *SHAPE), SHAPE, ql.Grid(-3, 3, 0.5, step=2))
    ql.run(graph, torch.tensor([-3, -1, 1, 3]).repeat(27).reshape(1, 3, 6, 6))
    with pytest.raises(InputError, match="steps of 2"):
        ql.run(graph, torch.zeros(1, 3, 6, 6, dtype=torch.int64))


# ---------------------------------------------------------------- verify


def test_verify_with_another_model(on_grid: ql.Graph) -> None:
    x = torch.zeros(1, 3, 6, 6, dtype=torch.uint8)
    with pytest.raises(VerifyError, match="not made from this model"):
        ql.verify(ready(Body(nn.BatchNorm2d(4)), *SHAPE), on_grid, x)
    with pytest.raises(VerifyError, match="0: its scale is.*convert again"):
        ql.verify(nn.Sequential(conv(3, 4), qnn.QuantReLU(bit_width=4), conv(4, 2)).eval(), on_grid, x)


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="public names"):
        ql.conver  # noqa: B018


def test_fixed_point_arguments() -> None:
    with pytest.raises(ValueError, match="rounding"):
        FixedPoint(8, 2, rounding="up")
    with pytest.raises(ValueError, match="bits"):
        FixedPoint(1, 0)
