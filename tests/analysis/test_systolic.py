"""The latency model equals the published one in every golden case, and a tile-by-tile loop."""

from __future__ import annotations

import csv
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantlib as ql
import zoo
from quantlib.analysis import AnalysisError, speedup_table, systolic_latency
from quantlib.analysis._steps import Window
from quantlib.analysis._walk import walk
from quantlib.analysis.systolic import _latency, broadcast_lines, convolution, gemm, plot, speedups
from quantlib.layers import BinaryConv2d, FixedPoint, FractionalConv2d, QuantSign

sizes = st.integers(1, 40)


def tiles(total: int, size: int) -> list[int]:
    """Sizes of the tiles that cover `total` in steps of `size`, cut off one by one."""
    found = []
    while total > 0:
        found.append(min(size, total))
        total -= size
    return found


@given(sizes, sizes, sizes, st.integers(1, 12), st.integers(1, 12))
def test_a_matrix_product_is_the_sum_over_its_tiles(pixels, reduction, filters, rows, cols):
    expected = 0
    for p in tiles(pixels, rows):
        for q in tiles(filters, cols):
            expected += reduction + p + q - 1
    assert gemm(pixels, reduction, filters, rows, cols) == expected


@given(sizes, sizes, st.integers(1, 7), st.integers(1, 7), st.integers(1, 12), st.integers(1, 12))
def test_broadcast_lines_is_the_sum_over_its_folds(lines, length, kernel, stride, rows, cols):
    work = sum(cols + kernel for _ in tiles(lines, rows) for _ in tiles(length, cols))
    assert broadcast_lines(lines, length, kernel, stride, rows, cols) == len(tiles(work, stride))


@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_a_model_of_one_convolution_costs_what_its_tiles_cost(size, kernel, stride, padding, groups, per_group):
    c_in, c_out = groups * per_group[0], groups * per_group[1]
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
    pixels = conv(torch.zeros(1, c_in, *size))[0, 0].numel()
    products = groups if per_group[0] > 1 or groups == 1 else c_out  # one product per group, or per output channel where depthwise
    reduction, filters = kernel[0] * kernel[1] * per_group[0], c_out // products
    expected = products * sum(reduction + p + q - 1 for p in tiles(pixels, 4) for q in tiles(filters, 5))
    assert systolic_latency(nn.Sequential(conv), (c_in, *size), 4, 5, grouped="blocks").cycles == expected


def window(args: list[int]) -> Window:
    c_in, c_out, kh, kw, sh, sw, ph, pw, groups = args
    return Window((kh, kw), (sh, sw), (2 * ph, 2 * pw), (1, 1), groups, c_in, c_out)


def test_golden_cases(shared):
    golden = np.load(shared / "golden" / "fuseconv_ops.npz")
    cases = 0
    for args, cycles in zip(golden["latency/gemm_args"].tolist(), golden["latency/gemm_cycles"].tolist(), strict=True):
        x, y, h, w, kh, kw, channels, sh, sw, filters = args
        pixels = ((h - kh) // sh + 1) * ((w - kw) // sw + 1)
        assert gemm(pixels, kh * kw * channels, filters, x, y) == cycles
        cases += 1
    for args, cycles in zip(golden["latency/fuse_args"].tolist(), golden["latency/fuse_cycles"].tolist(), strict=True):
        x, y, h, w, kh, kw, channels, sh, sw, _ = args
        line = (h * channels, w, kw, sw) if kh == 1 else (w * channels, h, kh, sh)
        assert broadcast_lines(*line, x, y) == cycles
        cases += 1
    for args, cycles in zip(golden["latency/conv_args"].tolist(), golden["latency/conv_cycles_systolic_fuse"].tolist(), strict=True):
        x, y, h, w, *rest = args
        assert [convolution(window(rest), (h, w), x, y, a, "published")[0] for a in ("systolic", "fuse")] == cycles
        cases += 1
    for (x, y, inputs, outputs), cycles in zip(
        golden["latency/linear_args"].tolist(), golden["latency/linear_cycles"].tolist(), strict=True
    ):
        assert gemm(1, inputs, outputs, x, y) == cycles
        cases += 1
    assert cases == 1060


def test_golden_convolutions_as_modules(shared):
    """The same through nn.Conv2d and a run of it, for the first of them."""
    golden = np.load(shared / "golden" / "fuseconv_ops.npz")
    args, cycles = golden["latency/conv_args"].tolist()[:60], golden["latency/conv_cycles_systolic_fuse"].tolist()
    for (x, y, h, w, c_in, c_out, kh, kw, sh, sw, ph, pw, groups), expected in zip(args, cycles[:60], strict=True):
        model = nn.Conv2d(c_in, c_out, (kh, kw), (sh, sw), (ph, pw), groups=groups)
        found = [systolic_latency(model, (c_in, h, w), x, y, a, "published").cycles for a in ("systolic", "fuse")]
        assert found == expected


NETWORKS = {
    "MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2", "MobileNetV3Small": "mobilenet_v3_small",
    "MobileNetV3Large": "mobilenet_v3_large", "MnasNetB1": "mnasnet_b1", "ResNet50": "resnet50",
}  # fmt: skip
QUICK = ("mobilenet_v3_small_imagenet", "mobilenet_v2_fuse_half_imagenet", "mnasnet_b1_fuse_full_hybrid_imagenet")


def zoo_name(network: str, variant: str) -> str:
    return f"{NETWORKS[network]}{'' if variant == 'baseline' else '_fuse_' + variant}_imagenet"


VARIANTS = ("baseline", "half", "full", "half_hybrid", "full_hybrid")
ALL = [zoo_name(n, v) for n in NETWORKS for v in VARIANTS if zoo_name(n, v) in zoo.names()]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_published_networks(name, shared):
    """Parameters, multiply-accumulates and cycles of every array and both kinds of hardware, from the golden table."""
    with open(shared / "golden" / "fuseconv_table.csv", newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if zoo_name(r["network"], r["variant"]) == name]
    assert rows
    model = zoo.get(name)
    counts, run = ql.analysis.count(model, (3, 224, 224)), walk(model, (3, 224, 224))
    kinds = {"conv": 0, "depthwise": 0, "linear": 0, "pointwise": 0}
    for row, step in zip(counts.rows, [s for s in run.steps if s.macs], strict=True):
        pointwise = step.window is not None and step.window.kernel == (1, 1) and step.kind == "conv"
        kinds["pointwise" if pointwise else row.kind] += row.macs
    for r in rows:
        assert (counts.parameters, counts.macs) == (int(r["params"]), int(r["macs_total"]))
        assert kinds == {k: int(r[f"macs_{k}"]) for k in kinds}
        found = _latency(run, int(r["array_x"]), int(r["array_y"]), r["hardware"].lower())
        expected = [int(r[f"cycles{k}"]) for k in ("", "_pointwise", "_depthwise", "_other")]
        assert [found.cycles, found.pointwise, found.depthwise, found.other] == expected


def test_quantized_layers_cost_their_shapes():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(6, 8, 3, bias=False))
    ours = nn.Sequential(FixedPoint(4, 2), BinaryConv2d(4, 6, 3, padding=1), QuantSign(2), FractionalConv2d(6, 8, 3))
    cycles = [[r.cycles for r in systolic_latency(m, (4, 9, 7), 8, 4).rows] for m in (plain, ours)]
    assert cycles[0] == cycles[1] == [ceil(63 / 8) * 2 * 35 + 2 * 63 + 8 * 6, ceil(35 / 8) * 2 * 53 + 2 * 35 + 5 * 8]


def test_same_padding_counts_as_given():
    same, given_ = nn.Conv2d(2, 3, (3, 5), padding="same"), nn.Conv2d(2, 3, (3, 5), padding=(1, 2))
    assert systolic_latency(same, (2, 8, 9), 8, 8).cycles == systolic_latency(given_, (2, 8, 9), 8, 8).cycles


class Named(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"odd": layer})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body["odd"](x)


@pytest.mark.parametrize(
    "layer,shape,why",
    [
        (nn.Conv1d(3, 4, 3), (3, 20), "2-D convolutions"),
        (nn.Conv3d(3, 4, 3), (3, 6, 6, 6), "2-D convolutions"),
        (nn.ConvTranspose2d(3, 4, 3), (3, 8, 8), "transposed"),
        (nn.Conv2d(3, 4, 3, dilation=2), (3, 8, 8), "dilation"),
        (nn.Conv2d(4, 4, 3, groups=2), (4, 8, 8), 'grouped="published"'),
        (nn.Linear(4, 5), (3, 4), "one row"),
    ],
)
def test_what_the_model_does_not_define_is_refused_by_name(layer, shape, why):
    with pytest.raises(AnalysisError, match=r"body\.odd.*" + why):
        systolic_latency(Named(layer), shape)


@pytest.mark.parametrize("options", [{"array": "Systolic"}, {"rows": 0}, {"grouped": "yes"}])
def test_wrong_arguments(options):
    with pytest.raises(AnalysisError, match="array|grouped"):
        systolic_latency(nn.Linear(3, 2), (3,), **options)


def test_tables_speedups_and_plot():
    base, row = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, (1, 3), padding=(0, 1), groups=16)
    latencies = {
        "base": systolic_latency(nn.Sequential(base, nn.Conv2d(16, 8, 1)), (16, 14, 14), 16, 16),
        "rows": systolic_latency(nn.Sequential(row, nn.Conv2d(16, 8, 1)), (16, 14, 14), 16, 16, array="fuse"),
    }
    ratio = latencies["base"].cycles / latencies["rows"].cycles
    assert speedups(latencies, latencies["base"]) == {"base": 1.0, "rows": ratio}
    table = speedup_table(latencies, "base").splitlines()
    assert len(table) == 4 and table[3].startswith("rows") and table[3].endswith(f"{ratio:.3f}")
    text = str(latencies["base"])
    assert f"{latencies['base'].depthwise:,}" in text and "total" in text
    with pytest.raises(AnalysisError, match="there are base, rows"):
        speedup_table(latencies, "other")
    bars = plot(latencies).axes[0].patches
    assert [b.get_width() for b in bars] == [v.of(k) for k in ("pointwise", "depthwise", "other") for v in latencies.values()]
