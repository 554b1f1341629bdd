"""ql.run: the same integers on every carrier, under every global setting, in every chunking, from every kind of image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from strategies import settle
from torch import Tensor, nn

import quantlib as ql
from quantlib import evaluator, ops
from quantlib.evaluator import CHUNK, InputError, carrier, decode, encode, engine, execute
from quantlib.ir import Decode, Graph, IntType, Node
from quantlib.layers import FixedPoint

SHAPE = (3, 8, 8)


@pytest.fixture(params=["native", "torch"], autouse=True)
def choice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the packed engine (where a compiler is found) and on torch's carriers."""
    monkeypatch.setenv("QUANTLIB_ENGINE", request.param)
    return str(request.param)


class Network(nn.Module):
    """Convolutions, a join, pools and a linear layer: one of most ops."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.q = qnn.QuantIdentity(bit_width=8) if front else nn.Identity()
        self.a = nn.Sequential(
            qnn.QuantConv2d(3, 6, 3, padding=1, bias=False, weight_bit_width=4), nn.BatchNorm2d(6), qnn.QuantReLU(bit_width=4)
        )
        self.b = nn.Sequential(qnn.QuantConv2d(6, 6, 3, padding=1, bias=False, weight_bit_width=3), nn.BatchNorm2d(6))
        self.join, self.pool, self.wide = qnn.QuantReLU(bit_width=3), nn.MaxPool2d(2), FixedPoint(16, 6)
        self.c = nn.Sequential(qnn.QuantConv2d(6, 4, 3, groups=2, bias=True, weight_bit_width=8), nn.PReLU(4))
        self.head = nn.Sequential(nn.Flatten(), qnn.QuantLinear(16, 5, bias=True, weight_bit_width=8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(self.q(x))
        x = self.pool(self.join(self.b(x) + x))
        x = self.wide(self.c(x))
        return self.head(x), x.mean((2, 3))


@pytest.fixture(scope="module", params=[True, False], ids=["own input quantizer", "stated grid"])
def case(request: pytest.FixtureRequest) -> tuple[Graph, Tensor]:
    torch.manual_seed(1)
    grid = None if request.param else ql.Grid(0, 255, 1 / 255)
    model = settle(Network(request.param), lambda r: torch.rand(8, *SHAPE, generator=r))
    x = torch.randint(0, 256, (2 * CHUNK + 3, *SHAPE)) / 255
    return ql.convert(model, SHAPE, grid), x


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- carriers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_every_carrier_that_holds_it_gives_the_same_integers(
    case: tuple[Graph, Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, x = case
    names = [n.name for n in graph.nodes]
    codes = encode(graph, x)
    want = execute(graph, codes, names)
    order = [torch.float32, torch.float64, torch.int64]
    monkeypatch.setattr(evaluator, "carrier", lambda g, n: max(carrier(g, n), dtype, key=order.index))
    got = execute(graph, codes, names)
    assert same(got, want)


def dense(weight: np.ndarray, lo: int, hi: int) -> Graph:
    t = IntType((weight.shape[1],), lo, hi)
    op = ops.Dense(weight)
    return Graph(
        (Node("input", ops.Input(t.shape, lo, hi), (), t), Node("y", op, ("input",), op.infer(t))),
        (Decode(("y",), (np.ones(()),), np.zeros(()), (weight.shape[0],)),),
    )


# 2^24 - 2^4 = 255 * 65793 - ..: sums just below, at, and above what each float carrier holds exactly
@pytest.mark.parametrize(
    ("bound", "dtype"),
    [
        ((1 << 24) - 1, torch.float32),
        (1 << 24, torch.float64),
        ((1 << 24) + 1, torch.float64),
        ((1 << 53) - 1, torch.float64),
        (1 << 53, torch.int64),
        ((1 << 53) + 1, torch.int64),
        ((1 << 61) + 12345, torch.int64),
    ],
)
def test_sums_at_the_limits_of_a_carrier(bound: int, dtype: torch.dtype, choice: str) -> None:
    """Rows whose extreme sum is exactly +-bound, made of odd numbers that a narrower carrier rounds."""
    hi = 1
    half = bound // 2
    rows = [[half, bound - half, 0, 0], [-half, half - bound, 0, 0], [bound // 3, bound // 3, bound - 2 * (bound // 3) - 1, 1]]
    graph = dense(np.array(rows, dtype=np.int64), -hi, hi)
    node = graph.by_name["y"]
    assert node.type.hi == bound and node.type.lo == -bound
    assert carrier(graph, node) == dtype
    assert choice == "native" or str(dtype).removeprefix("torch.") in engine(graph)
    x = torch.tensor(np.array(np.meshgrid(*[[-1, 0, 1]] * 4)).reshape(4, -1).T)
    want = [[sum(int(w) * int(v) for w, v in zip(row, image, strict=True)) for row in rows] for image in x.tolist()]  # Python's integers
    assert ql.run(graph, x, integers=True)["y"].tolist() == want


def test_an_accumulator_beyond_62_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="63 bits|62 bits"):
        ql.run(dense(np.array([[1 << 61, 1 << 61, 1 << 61]]), -1, 1), torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("k", [516, 519])
def test_long_sums_of_bytes(k: int) -> None:
    """255 * 127 * 518 < 2^24 < 255 * 127 * 519: the same images through float32 and float64 carriers, against numpy's integers."""
    random = np.random.default_rng(k)
    weight = random.integers(-127, 128, (5, k))
    weight[0], weight[1] = 127, -127
    weight[2, ::2], weight[2, 1::2] = 127, 126
    graph = dense(weight, 0, 255)
    assert carrier(graph, graph.by_name["y"]) == (torch.float32 if k == 516 else torch.float64)
    x = random.integers(0, 256, (20, k))
    x[0], x[1] = 255, 254
    x[2, 0] = 1
    assert np.array_equal(ql.run(graph, x, integers=True)["y"].numpy(), x @ weight.T)


def test_a_wide_convolution() -> None:
    """16-bit images times 16-bit weights, 27 taps: 2^35, beyond float32."""
    random = np.random.default_rng(0)
    weight = random.integers(-(2**15), 2**15, (4, 3, 3, 3))
    weight[0] = 2**15 - 1
    t = IntType(SHAPE, -(2**15), 2**15 - 1)
    op = ops.Conv2d(weight, padding=(1, 1, 1, 1))
    graph = Graph(
        (Node("input", ops.Input(SHAPE, t.lo, t.hi), (), t), Node("y", op, ("input",), op.infer(t))),
        (Decode(("y",), (np.ones(()),), np.zeros(()), (4, 8, 8)),),
    )
    assert carrier(graph, graph.by_name["y"]) is torch.float64
    x = random.integers(t.lo, t.hi + 1, (3, *SHAPE))
    x[0] = t.lo
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).astype(object)
    want = np.zeros((3, 4, 8, 8), dtype=object)
    for i in range(3):
        for j in range(3):
            for c in range(3):
                want = want + padded[:, None, c, i : i + 8, j : j + 8] * weight[None, :, c, i, j].astype(object)[:, :, None, None]
    assert (ql.run(graph, x, integers=True)["y"].numpy() == want).all()


# ---------------------------------------------------------------- global settings


@pytest.fixture
def settings() -> Iterator[None]:
    """Whatever a test switches, the next one starts as usual."""
    owners = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    saved, threads = [o.fp32_precision for o in owners], torch.get_num_threads()
    yield
    for o, v in zip(owners, saved, strict=True):
        o.fp32_precision = v
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def test_reduced_precision_settings_do_not_change_integers(case: tuple[Graph, Tensor], settings: None) -> None:
    graph, x = case
    want = ql.run(graph, x, integers=True)
    owners = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    for value in ("tf32", "bf16"):
        for o in owners:
            try:
                o.fp32_precision = value
            except RuntimeError:
                continue
        before = [o.fp32_precision for o in owners]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = ql.run(graph, x, integers=True)
            assert torch.is_autocast_enabled("cpu")
        assert same(got, want)
        assert [o.fp32_precision for o in owners] == before, "the user's settings are back as they were"


def test_other_global_settings(case: tuple[Graph, Tensor], settings: None) -> None:
    graph, x = case
    want, real = ql.run(graph, x, integers=True), ql.run(graph, x)
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        assert same(ql.run(graph, x, integers=True), want)
        assert all(y.dtype is torch.float32 and torch.equal(y, r) for y, r in zip(ql.run(graph, x), real, strict=True))
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(2)
    assert same(ql.run(graph, x, integers=True), want)
    with torch.inference_mode():
        assert same(ql.run(graph, x, integers=True), want)
    assert not any(y.requires_grad for y in ql.run(graph, x.clone().requires_grad_()))


def test_the_settings_come_back_after_an_error(case: tuple[Graph, Tensor], settings: None) -> None:
    graph, x = case
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with pytest.raises(InputError):
        ql.run(graph, x[:, :1])
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16" and torch.is_grad_enabled()


# ---------------------------------------------------------------- batches and kinds of images


def test_images_do_not_see_each_other(case: tuple[Graph, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = case
    want = ql.run(graph, x, integers=True)
    assert len(x) > 2 * CHUNK
    for chunk in (1, 3, 64):
        monkeypatch.setattr(evaluator, "CHUNK", chunk)
        assert same(ql.run(graph, x, integers=True), want)
    singles = [ql.run(graph, x[i : i + 1], integers=True) for i in range(len(x))]
    assert same({k: torch.cat([s[k] for s in singles]) for k in want}, want)
    order = torch.randperm(len(x))
    assert same(ql.run(graph, x[order], integers=True), {k: v[order] for k, v in want.items()})


def test_kinds_of_images(case: tuple[Graph, Tensor]) -> None:
    graph, x = case
    want, codes = ql.run(graph, x, integers=True), encode(graph, x)
    kinds = [
        x.numpy(),
        x.double(),
        x.double().numpy(),
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flip(0).flip(0),
        x.numpy()[::-1][::-1],
        np.asfortranarray(x.numpy()),
        codes,
        codes.int(),
        codes.numpy(),
        codes.numpy().astype(np.int32),
        codes.to(torch.int16).contiguous(memory_format=torch.channels_last),
        x.clone().requires_grad_(),
    ]
    if graph.input.type.lo == 0:
        kinds += [codes.to(torch.uint8), codes.numpy().astype(np.uint8), codes.numpy().astype(np.uint16)]
    else:
        kinds += [codes.to(torch.int8), codes.numpy().astype(np.int8)]
    for k in kinds:
        assert same(ql.run(graph, k, integers=True), want), type(k)
    frozen = x.numpy().copy()
    frozen.setflags(write=False)
    assert same(ql.run(graph, frozen, integers=True), want)


def test_images_are_not_written_to(case: tuple[Graph, Tensor]) -> None:
    graph, x = case
    for image in (x.clone(), encode(graph, x)):
        before = image.clone()
        ql.run(graph, image)
        assert torch.equal(image, before)


def test_the_output_is_the_decoded_integers(case: tuple[Graph, Tensor]) -> None:
    graph, x = case
    y, z = ql.run(graph, x), decode(graph, ql.run(graph, x, integers=True))
    assert isinstance(y, tuple) and len(y) == len(graph.decodes) == 2
    assert all(torch.equal(a, b) and a.dtype is torch.float32 for a, b in zip(y, z, strict=True))
    assert y[0].shape == (len(x), 5) and y[1].shape == (len(x), 4)


def test_intermediate_edges(case: tuple[Graph, Tensor]) -> None:
    graph, x = case
    names = [n.name for n in graph.nodes]
    every = execute(graph, encode(graph, x), names)
    assert torch.equal(every["input"], encode(graph, x))
    for node in graph.nodes[1:]:
        inputs = [every[i] for i in node.inputs]
        assert torch.equal(node.op.evaluate(*inputs), every[node.name]), f"{node.name}: evaluate on int64 is the definition"
        t = node.type
        assert tuple(every[node.name].shape[1:]) == t.shape and int(every[node.name].min()) >= t.lo and int(every[node.name].max()) <= t.hi


def test_float_images_near_the_grid(case: tuple[Graph, Tensor]) -> None:
    """uint8 / 255 computed in float32, by division or multiplication, is the same image; half a step off is none."""
    graph, _ = case
    if graph.front is not None:
        pytest.skip("this model quantizes any float itself")
    codes = torch.arange(192, dtype=torch.uint8).reshape(1, *SHAPE)
    for real in (codes / 255, codes * (1 / 255), codes.double() / 255, torch.from_numpy(codes.numpy() / np.float32(255))):
        assert torch.equal(encode(graph, real), codes.long())
    with pytest.raises(InputError, match="not on the input grid"):
        encode(graph, codes / 255 + 0.25 / 255)


def test_the_front_end_decides_as_the_quantizer_does() -> None:
    """Every float32 next to a decision point, on either side, gets the code of the model's own quantizer run in float64."""
    torch.manual_seed(0)
    q = qnn.QuantIdentity(bit_width=6, return_quant_tensor=True)
    model = nn.Sequential(q, qnn.QuantConv2d(1, 1, 1, bias=False)).train()
    for _ in range(3):
        model(torch.randn(16, 1, 8, 8))
    graph = ql.convert(model.eval(), (1, 8, 8))
    assert graph.front is not None
    t = torch.from_numpy(graph.front.thresholds.reshape(-1).copy())
    inf = torch.tensor(math.inf)
    below = torch.nextafter(t, -inf)
    x = torch.cat(
        [
            t,
            below,
            torch.nextafter(below, -inf),
            torch.nextafter(t, inf),
            torch.randn(1000) * 3,
            torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]),
        ]
    )
    x = x[: len(x) // 64 * 64].reshape(-1, 1, 8, 8)
    with torch.no_grad():
        y = nn.Sequential(q).double()(x.double())
        want = (y.value / y.scale).round().long()
    assert torch.equal(encode(graph, x), want)


# ---------------------------------------------------------------- graph files


def test_a_saved_graph_runs_equal(case: tuple[Graph, Tensor], tmp_path: Path) -> None:
    graph, x = case
    path = tmp_path / "network.qlg"
    ql.save(graph, path)
    loaded = ql.load(path)
    assert same(ql.run(loaded, x, integers=True), ql.run(graph, x, integers=True))
    assert all(torch.equal(a, b) for a, b in zip(ql.run(loaded, x), ql.run(graph, x), strict=True))
    assert engine(loaded) == engine(graph) and str(loaded) == str(graph)


def test_one_op_networks_without_a_node_to_run() -> None:
    """A network whose output is its input."""
    t = IntType((2,), 0, 3, 0.5)
    graph = Graph((Node("input", ops.Input((2,), 0, 3), (), t),), (Decode(("input",), (np.asarray(0.5),), np.zeros(()), (2,)),))
    x = torch.tensor([[0, 3], [1, 2]])
    assert torch.equal(ql.run(graph, x, integers=True)["input"], x)
    assert ql.run(graph, x).tolist() == [[0.0, 1.5], [0.5, 1.0]]
