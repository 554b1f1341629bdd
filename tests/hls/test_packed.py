"""Kernels that make several products per DSP slice: against the ops, against the arithmetic of `quantlib.packing`, and in networks."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_every_network import randomised, shape_of

import quantlib as ql
import zoo
from quantlib.hls import packed
from quantlib.hls.packed_unit import Unit
from quantlib.ir import Graph, GraphError, IntType
from quantlib.ops import Conv2d, Dense, Op
from quantlib.packing import DSPS, multiply_accumulate
from quantlib.schedule import Folding, Schedule

Case = tuple[str, Op, IntType, Folding]


def _kernels() -> ModuleType:
    """kernels.py beside this file."""
    spec = importlib.util.spec_from_file_location("tests_hls_kernels", Path(__file__).with_name("kernels.py"))
    assert spec and spec.loader
    module = sys.modules["tests_hls_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _kernels()


def codes(x: IntType, seed: int = 0) -> torch.Tensor:
    """All lowest codes, all highest, a chessboard of both, random ones."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, x.levels, (4, *x.shape))
    found[0], found[1] = 0, x.levels - 1
    found[2] = rng.integers(0, 2, x.shape) * (x.levels - 1)
    return torch.from_numpy(found * x.step + x.lo)


def weights(rng: np.random.Generator, bits: int, *shape: int) -> np.ndarray:
    """Signed codes, with a channel of lowest ones only and, where there are more, one of highest ones."""
    w = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    w[0] = -(2 ** (bits - 1))
    w[1:2] = 2 ** (bits - 1) - 1
    return w


def divisor(rng: np.random.Generator, n: int) -> int:
    return int(rng.choice([d for d in range(1, n + 1) if n % d == 0]))


def grid(kernel: int, dsps: Sequence[str], bits: Sequence[tuple[int, int]], every: bool) -> list[Case]:
    """A convolution for each pair of (weight bits, activation bits), at every number of columns per segment or at one of them; every
    fifth a Dense."""
    rng, found = np.random.default_rng(kernel), []
    for k, (dsp, (w, a)) in enumerate(itertools.product(dsps, bits)):
        if k % 5 == 4 and kernel == 1:
            op: Op = Dense(weights(rng, w, 6, 20))
            x = IntType((5, 2, 2), 0, 2**a - 1)
        else:
            op = Conv2d(weights(rng, w, 4, 3 + k % 2, 1 if k % 3 else kernel, kernel), padding=(kernel // 2,) * 4)
            x = IntType((3 + k % 2, 3, 7), 0, 2**a - 1)
        limits = op.folds((x,), op.infer(x)).packed[dsp]
        for n in limits.taps if every else limits.taps[-1:]:
            folding = Folding(divisor(rng, limits.pe), divisor(rng, limits.simd), taps=n, packing=dsp)
            found.append((f"k{kernel}-w{w}a{a}-{dsp}-n{n}-pe{folding.pe}-simd{folding.simd}", op, x, folding))
    return found


def odd_case(seed: int) -> Case | None:
    """Strides, dilations, one-sided padding, groups, depthwise layers, signed inputs and lattices; None where the bits are too wide."""
    r = np.random.default_rng(seed)
    k, sw, dw = int(r.choice([1, 2, 3, 5])), int(r.choice([1, 1, 1, 2, 3])), int(r.choice([1, 1, 1, 2, 3]))
    kh, sh, dh = int(r.choice([1, 2, k])), int(r.choice([1, 1, 2, 3])), int(r.choice([1, 1, 2]))
    t, b, left, right = (int(v) for v in r.integers(0, 4, 4)) if r.random() < 0.7 else (0, 0, 0, 0)
    w, a = int(r.integers(1, 9)), int(r.integers(1, 9))
    groups = int(r.choice([1, 1, 2, 3]))
    depthwise = r.random() < 0.25
    inputs, outputs = (4, 4) if depthwise else (groups * int(r.integers(1, 4)), groups * int(r.integers(1, 4)))
    groups = 4 if depthwise else groups
    step = int(r.choice([1, 1, 2, 3, 4, 6]))
    lo = int(r.choice([0, 0, -1, 1, -(2 ** (a - 1)), -step, 5 * step, -step * (2**a - 1), -step * (2**a + 3)]))
    shape = inputs, int(r.integers((kh - 1) * dh + 1, (kh - 1) * dh + 6)), int(r.integers((k - 1) * dw + 1, (k - 1) * dw + 9))
    x = IntType(shape, lo, lo + step * (2**a - 1), 1.0, step)
    weight = weights(r, w, outputs, inputs // groups, kh, k)
    weight = np.maximum(weight, 1 - 2 ** (w - 1)) if r.random() < 0.5 else weight  # the lowest code is absent
    op = Conv2d(weight, (sh, sw), (t, b, left, right), (dh, dw), groups)
    offers = op.folds((x,), op.infer(x)).packed
    if not offers:
        return None
    dsp = str(r.choice(list(offers)))
    limits = offers[dsp]
    folding = Folding(divisor(r, limits.pe), divisor(r, limits.simd), taps=int(r.choice(limits.taps)), packing=dsp)
    return f"odd{seed}", op, x, folding


ALL = list(itertools.product(range(2, 9), range(2, 9)))
FEW = [(2, 2), (3, 7), (4, 4), (5, 3), (8, 8)]


def odd(seeds: range) -> list[Case]:
    return [c for c in map(odd_case, seeds) if c is not None]


BUILDS = {"fast": ("-DQL_MODE=0",), "timed": ("-DQL_MODE=2", "-DQL_SYNTHESIS_BODIES")}
SANITIZERS = ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan")


def compare(cases: Sequence[Case], folder: Path, flags: tuple[str, ...] = ()) -> None:
    """Both bodies of every kernel give the integers of the op, in exactly the iterations that the kernels state."""
    made = [kernels.Case(name, op, (x,), folding) for name, op, x, folding in cases]
    running = {name: kernels.compile_cases(made, folder / name, (*own, *flags)) for name, own in BUILDS.items()}
    for process in running.values():
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[:4000]
    libraries = {name: kernels.load(folder / name) for name in BUILDS}
    for number, c in enumerate(made):
        x, calls = codes(c.types[0], number), c.kernels
        want = c.op.evaluate(x).numpy()
        for build, library in libraries.items():
            got, ticks, blocked = kernels.run(library, number, c, [x.numpy()])
            assert not blocked, c.name
            assert np.array_equal(got, want), (build, c.name)
            if build == "timed":
                assert [ticks[f"k{k}"] for k in range(len(calls))] == [4 * k.iterations for k in calls], c.name


def consistent(cases: Sequence[Case]) -> None:
    """Costs name the cycles of the kernels and the slices of the unit; demands rise, end within the input, one per output word."""
    for name, op, x, folding in cases:
        y = op.infer(x)
        call, cost = op.hls((x,), y, folding), op.cost((x,), y, folding)
        u = packed.unit_of(op, x, y, folding)
        assert cost.cycles == call.iterations == u.cycles, name
        assert cost.dsp == u.slices, name
        assert call.kernels[-1].output.words * call.kernels[-1].output.lanes == y.numel, name
        for kernel in call.kernels:
            (need,) = kernel.demand()
            assert len(need) == kernel.output.words, name
            assert (np.diff(need) >= 0).all() and need[-1] <= kernel.inputs[0].words, name


def test_kernels_equal_the_op_at_several_widths(tmp_path: Path) -> None:
    cases = [c for kernel in (1, 3) for c in grid(kernel, list(DSPS)[1:2], FEW, every=False)] + odd(range(10))
    compare(cases, tmp_path)
    consistent(cases)


@pytest.mark.slow
@pytest.mark.parametrize("dsp", DSPS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_kernels_equal_the_op_at_all_widths(tmp_path: Path, kernel: int, dsp: str) -> None:
    cases = grid(kernel, [dsp], ALL, every=True)
    compare(cases, tmp_path)
    consistent(cases)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(5))
def test_odd_layers_equal_the_op_under_the_sanitizer(tmp_path: Path, block: int) -> None:
    cases = odd(range(100 * (block + 1), 100 * (block + 1) + 60))
    compare(cases, tmp_path, SANITIZERS)
    consistent(cases)


def by_multiply_accumulate(op: Op, x: IntType, u: Unit, image: np.ndarray) -> np.ndarray:
    """What the unit does with one image, in the arithmetic that tests/test_packing.py proves, checked for every port and sum."""
    la, p = u.layer, u.packing
    per_group = la.x[0] // u.groups
    flat = image if image.shape == la.x else np.moveaxis(image, 0, -1).reshape(la.x)  # a Dense reads in the order of the stream
    index = (flat - la.lo) // la.step
    table = packed.weight_table(op, u, x).reshape(u.groups, -1, u.steps, u.words, p.weights, u.simd).swapaxes(-1, -2)
    sums = np.zeros((la.y[0], la.y[1], u.cut.segments * u.cut.n + u.cut.taps - 1), np.int64)
    for row, s, g in itertools.product(range(la.y[1]), range(u.cut.segments), range(u.groups)):
        for step, (i, phase, part) in enumerate(itertools.product(range(la.kernel[0]), range(u.cut.phases), range(per_group // u.lanes))):
            from_row = row * la.stride[0] - la.padding[0] + i * la.dilation[0]
            first = g * per_group + part * u.lanes
            acts = np.full((u.lanes, u.cut.n), la.zero)
            for n in range(u.cut.n):
                col = (u.cut.first + s * u.cut.n + n) * la.stride[1] - la.padding[2] + phase * u.cut.apart
                if 0 <= from_row < la.x[1] and 0 <= col < la.x[2]:
                    acts[:, n] = index[first : first + u.lanes, from_row, col]
            for block, word in itertools.product(range(table.shape[1]), range(u.words)):
                lanes = acts[word * u.pe // u.words][None] if la.depthwise else acts
                fields = np.zeros(p.fields, np.int64)
                for c in range(0, len(lanes), u.chain):
                    fields += multiply_accumulate(p, lanes[c : c + u.chain], table[g, block, step, word, c : c + u.chain], u.trick)
                out = (g * table.shape[1] + block) * u.pe
                if u.cut.conv:
                    channel, tap = divmod(word, u.words // u.pe)
                    kept = min(p.fields, u.cut.n + u.cut.taps - 1 - tap * p.weights)
                    at = s * u.cut.n + tap * p.weights
                    sums[out + channel, row, at : at + kept] += fields[:kept]
                else:
                    for n, j in itertools.product(range(p.acts), range(p.weights)):
                        if word * p.weights + j < u.pe:
                            field = (n * p.strides[0] + j * p.strides[1]) // p.stride
                            sums[out + word * p.weights + j, row, s * p.acts + n] += fields[field]
    wanted = sums[:, :, u.cut.skipped : u.cut.skipped + la.y[2]]
    base = la.lo * op.weight.reshape(la.y[0], -1).sum(1)  # type: ignore[attr-defined]
    return base[:, None, None] + la.step * wanted


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_the_unit_is_the_proven_arithmetic(seed: int) -> None:
    case = odd_case(seed)
    if case is None:
        return
    _, op, x, folding = case
    y = op.infer(x)
    u = packed.unit_of(op, x, y, folding)
    image = codes(x, seed)[2:3]
    got = by_multiply_accumulate(op, x, u, image[0].numpy())
    assert np.array_equal(got.reshape(y.shape), op.evaluate(image)[0].numpy())


def test_a_dense_layer_reads_its_columns_in_stream_order() -> None:
    rng = np.random.default_rng(3)
    op, x = Dense(weights(rng, 3, 5, 12)), IntType((3, 2, 2), -4, 3)
    y = op.infer(x)
    u = packed.unit_of(op, x, y, Folding(5, 3, packing="dsp48e2"))
    image = codes(x)[3:]
    got = by_multiply_accumulate(op, x, u, image[0].numpy())
    assert np.array_equal(got.reshape(y.shape), op.evaluate(image)[0].numpy())


def test_published_folding_of_ultranet_takes_the_published_cycles() -> None:
    """4-bit UltraNet, (simd, pe) of its parallelism file, two columns and three taps per slice: 76,800 cycles, then 153,600."""
    layers = [  # inputs, outputs, rows, columns, simd, pe, cycles of the unit, H * W/2 * O/pe * 3*I/simd by hand, and of the slowest stage:
        (3, 16, 160, 320, 3, 16, 76_800, 76_800 + 2 * 320),  # segments, which first take in two rows of 320 pixels
        (16, 32, 80, 160, 16, 4, 153_600, 153_600),
        (32, 64, 40, 80, 8, 8, 153_600, 153_600),
        (64, 64, 20, 40, 8, 4, 153_600, 153_600),
        (64, 64, 10, 20, 4, 2, 153_600, 153_600),
    ]
    for inputs, outputs, rows, columns, simd, pe, published, cycles in layers:
        op = Conv2d(weights(np.random.default_rng(0), 4, outputs, inputs, 3, 3), padding=(1, 1, 1, 1))
        x = IntType((inputs, rows, columns), 0, 15)
        y = op.infer(x)
        folding = Folding(pe, simd, taps=2, packing="dsp48e2")
        cost = op.cost((x,), y, folding)
        assert (packed.unit_of(op, x, y, folding).iterations, cost.cycles, cost.dsp) == (published, cycles, pe * simd)


def test_examples_of_the_page(root: Path) -> None:
    """Cycles and slices of the table in docs/packing.md, by hand: pixels * O/pe * words per pixel, words side by side * simd."""
    page = (root / "docs" / "packing.md").read_text()
    examples = [  # weight bits, activation bits, outputs, kernel, rows, columns, N: packing, cycles, slices
        (4, 4, 64, 3, 20, 40, 2, "conv 2 x 3", 20 * 40 // 2 * 8 * 3 * 8, 8 * 8),
        (2, 2, 64, 3, 20, 40, 4, "conv 4 x 3", 20 * 40 // 4 * 8 * 3 * 8, 8 * 8),
        (8, 8, 128, 1, 14, 14, 1, "mult 1 x 2", 14 * 14 * 16 * 8, 8 // 2 * 8),
        (4, 4, 128, 1, 14, 14, 2, "mult 2 x 2", 14 * 14 // 2 * 16 * 8, 8 // 2 * 8),
    ]
    for w, a, outputs, kernel, rows, columns, n, packing, cycles, slices in examples:
        op = Conv2d(weights(np.random.default_rng(0), w, outputs, 64, kernel, kernel), padding=(kernel // 2,) * 4)  # type: ignore[arg-type]
        x = IntType((64, rows, columns), 0, 2**a - 1)
        y, folding = op.infer(x), Folding(8, 8, taps=n, packing="dsp48e2")
        cost, p = op.cost((x,), y, folding), packed.unit_of(op, x, y, folding).packing
        assert (f"{p.scheme} {p.acts} x {p.weights}", cost.cycles, cost.dsp) == (packing, cycles, slices)
        assert f"{packing} | {cycles:,} | {slices} |" in page


def test_bits_that_are_too_wide_are_refused_with_a_reason() -> None:
    op, x = Conv2d(weights(np.random.default_rng(0), 12, 4, 4, 3, 3)), IntType((4, 5, 5), 0, 4095)
    y = op.infer(x)
    with pytest.raises(GraphError, match="no slice makes more than one product of 12-bit weights and 12-bit activations"):
        op.hls((x,), y, Folding(1, 1, packing="dsp58"))
    narrow = IntType((4, 5, 5), 0, 15)
    op = Conv2d(weights(np.random.default_rng(0), 4, 4, 4, 3, 3))
    with pytest.raises(GraphError, match="taps = 7: choose"):
        op.hls((narrow,), op.infer(narrow), Folding(1, 1, taps=7, packing="dsp48e2"))


def everywhere(graph: Graph, foldings: dict[str, Folding], dsp: str = "dsp48e2", columns: int = 2) -> dict[str, Folding]:
    """The foldings with packing in every layer that offers it."""
    found = {}
    for node in graph:
        folding = foldings.get(node.name, Folding())
        limits = node.op.folds(graph.types(node), node.type).packed.get(dsp)
        taps = max(n for n in limits.taps if n <= columns) if limits else 1
        found[node.name] = Folding(folding.pe, folding.simd, folding.memory, taps, dsp) if limits else folding
    return found


def runs_as_planned(graph: Graph, foldings: dict[str, Folding], folder: Path, modes: Sequence[str], images: int = 4) -> None:
    """Integers of `ql.run` in every mode; the timed run takes the cycles of the plan."""
    plan = ql.estimate(graph, "xczu9eg", schedule=Schedule.of(graph, foldings))
    made = ql.export(graph, folder, plan=plan)
    t = graph.input.type
    x = torch.from_numpy(np.random.default_rng(1).integers(0, t.levels, (images, *t.shape)) * t.step + t.lo)
    want = ql.run(graph, x)
    want = want if isinstance(want, (list, tuple)) else [want]
    for mode in modes:
        got = made.csim(x, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(got if isinstance(got, (list, tuple)) else [got], want, strict=True)), mode
    if "timed" in modes:
        assert made.last is not None
        assert {s.name: s.iterations for s in made.net.stages}.items() <= made.last.iterations.items()
        assert made.last.cycles == plan.cycles


@pytest.mark.parametrize("name", ["small", "residual"])
def test_networks_with_packing_in_every_layer(nets: ModuleType, tmp_path: Path, name: str) -> None:
    graph, foldings = getattr(nets, name)()
    chosen = everywhere(graph, foldings)
    assert sum(bool(f.packing) for f in chosen.values()) >= 2
    runs_as_planned(graph, chosen, tmp_path / "p", ["timed"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vggtiny_cifar10", "ultranet_bypass_dacsdc", "skynet_dacsdc"])
def test_zoo_networks_with_packing_in_every_layer(tmp_path: Path, name: str) -> None:
    """Depthwise layers, 1x1 layers and 8-bit inputs among them."""
    graph = ql.convert(randomised(name, dict((zoo.card(name).converts or ({},))[0])), shape_of(name))
    plan = ql.estimate(graph, "xczu9eg")
    chosen = everywhere(graph, {row.name: Folding(row.folding.pe, row.folding.simd) for row in plan.rows})
    assert all(chosen[n.name].packing for n in graph if isinstance(n.op, (Conv2d, Dense)))
    runs_as_planned(graph, chosen, tmp_path / "p", ["fast", "fifo", "timed"])
