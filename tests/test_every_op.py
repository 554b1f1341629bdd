"""Every registered op, driven by its own examples: interval, carriers, an independent loop, refusals, and its C++ kernel."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from quantlib.ir import GraphError, IntType
from quantlib.ops import Op


def _beside(path: str) -> ModuleType:
    """A helper module of the tests, by file."""
    name = "tests_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


_brute, _kernels = _beside("ops/brute.py"), _beside("hls/kernels.py")

COMPUTED = sorted(set(Op.registry) - {"Input"})
CASES = [(name, i) for name in COMPUTED for i in range(len(Op.registry[name].examples()))]


def case(name: str, i: int) -> tuple[Op, tuple[IntType, ...]]:
    return Op.registry[name].examples()[i]


def lattice(x: IntType, images: int, seed: int) -> torch.Tensor:
    """A batch on the lattice of x: all lo, all hi, a chessboard of both, then random codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, x.levels, (images, *x.shape))
    codes[0], codes[1] = 0, x.levels - 1
    codes[2] = rng.integers(0, 2, x.shape) * (x.levels - 1)
    return torch.from_numpy(codes * x.step + x.lo)


def batch(types: tuple[IntType, ...], images: int = 6) -> list[torch.Tensor]:
    """Two edges also meet at opposite ends."""
    values = [lattice(t, images, 7 * i) for i, t in enumerate(types)]
    return [v.flip(0) if i % 2 else v for i, v in enumerate(values)]


def test_every_op_has_an_independent_loop_and_examples() -> None:
    assert set(_brute.BRUTE) == set(COMPUTED)
    for name in Op.registry:
        assert len(Op.registry[name].examples()) >= 2, name


@pytest.mark.parametrize(("name", "i"), CASES)
def test_interval_and_lattice_contain_every_value(name: str, i: int) -> None:
    op, types = case(name, i)
    y = op.infer(*types)
    values = op.evaluate(*batch(types, 24))
    assert values.dtype == torch.int64
    assert tuple(values.shape) == (24, *y.shape)
    assert int(values.min()) >= y.lo
    assert int(values.max()) <= y.hi
    assert bool(((values - y.lo) % y.step == 0).all())
    assert int(values.abs().max()) <= op.magnitude(*types)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_evaluate_is_the_definition(name: str, i: int) -> None:
    op, types = case(name, i)
    y = op.infer(*types)
    x = batch(types)
    values = op.evaluate(*x).numpy()
    for n in range(len(x[0])):
        want = _brute.BRUTE[name](op, y, *(v[n].numpy() for v in x))
        assert np.array_equal(values[n], want.astype(np.int64))


@pytest.mark.parametrize(("name", "i"), CASES)
def test_float_carriers_that_hold_the_magnitude_are_exact(name: str, i: int) -> None:
    op, types = case(name, i)
    x = batch(types)
    want = op.evaluate(*x)
    for dtype, limit in ((torch.float32, 2**24), (torch.float64, 2**53)):
        if op.magnitude(*types) <= limit:
            got = op.evaluate(*(v.to(dtype) for v in x))
            assert got.dtype == dtype
            assert torch.equal(got.long(), want)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_evaluate_leaves_its_inputs_alone(name: str, i: int) -> None:
    op, types = case(name, i)
    x = batch(types)
    before = [v.clone() for v in x]
    op.evaluate(*x).add_(1)
    again = op.evaluate(*x)
    if name not in ("Reshape",):  # a view may share memory; it is never written by an op
        assert all(torch.equal(a, b) for a, b in zip(before, x, strict=True))
        assert torch.equal(again, op.evaluate(*before))


@pytest.mark.parametrize(("name", "i"), CASES)
def test_wrong_shapes_and_counts_are_graph_errors(name: str, i: int) -> None:
    op, types = case(name, i)
    if name != "Concat":
        with pytest.raises(GraphError, match=name):
            op.infer(*types, types[0], *types)
    with pytest.raises(GraphError, match=name):
        op.infer()
    if name in ("Add", "Multiply", "Join", "AffineJoin", "Concat"):
        odd = IntType((*types[-1].shape[:-1], types[-1].shape[-1] + 1, 1), types[-1].lo, types[-1].hi, 1.0, types[-1].step)
        with pytest.raises(GraphError, match=name):
            op.infer(*types[:-1], odd)
    if name in ("Conv2d", "FractionalConv2d", "Dense", "SaturatingDense", "Reshape"):
        with pytest.raises(GraphError, match=name):
            op.infer(IntType((types[0].shape[0] + 1, *types[0].shape[1:]), types[0].lo, types[0].hi, 1.0, types[0].step))
    if name in ("Conv2d", "FractionalConv2d", "MaxPool", "SumPool", "Slice2d", "Pad", "Shift"):
        with pytest.raises(GraphError, match=name):
            op.infer(IntType((types[0].numel,), types[0].lo, types[0].hi, 1.0, types[0].step))


def test_structural_ops_carry_the_scale() -> None:
    from quantlib.ops import Concat, Rearrange, Reshape, Select, Slice2d

    x = IntType((4, 3, 2), 0, 7, np.arange(1, 5).reshape(4, 1, 1) / 8)
    assert np.array_equal(Select(np.array([3, 0])).infer(x).scale, np.array([4, 1]).reshape(2, 1, 1) / 8)
    assert Slice2d((0, 3, 2), (1, 2, 1)).infer(x).scale.shape == (4, 1, 1)
    assert np.array_equal(Reshape((24,)).infer(x).scale, np.repeat(np.arange(1, 5) / 8, 6))
    assert Select(np.array([2, 2])).infer(x).scale.shape == ()
    swapped = Rearrange(np.arange(24).reshape(4, 3, 2).transpose(1, 0, 2)).infer(x).scale
    assert np.array_equal(swapped, np.broadcast_to(np.arange(1, 5).reshape(1, 4, 1) / 8, (3, 4, 2)))
    both = Concat().infer(x, IntType((1, 3, 2), -1, 0, 0.5)).scale
    assert np.array_equal(both.reshape(-1), [0.125, 0.25, 0.375, 0.5, 0.5])


KERNEL_CASES = [
    _kernels.Case(f"{name}-{i}-pe{f.pe}-simd{f.simd}-taps{f.taps}{f.packing}", *case(name, i), f)
    for name, i in CASES
    for f in _kernels.foldings(*case(name, i))
]
BUILDS = {"fast": ("-DQL_MODE=0",), "timed": ("-DQL_MODE=2", "-DQL_SYNTHESIS_BODIES")}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """All kernels, twice: one stage after the other with fast leaf bodies; on fibers with a clock and the bodies for synthesis."""
    folders = {name: tmp_path_factory.mktemp("kernels") / name for name in BUILDS}
    running = {name: _kernels.compile_cases(KERNEL_CASES, folders[name], flags) for name, flags in BUILDS.items()}
    for process in running.values():
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[:4000]
    yield {name: _kernels.load(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("number", range(len(KERNEL_CASES)), ids=[c.name for c in KERNEL_CASES])
def test_kernel_equals_evaluate(libraries: dict[str, object], number: int, build: str) -> None:
    c = KERNEL_CASES[number]
    x = batch(c.types, 4)
    got, ticks, blocked = _kernels.run(libraries[build], number, c, [v.numpy() for v in x])
    assert not blocked
    assert np.array_equal(got, c.op.evaluate(*x).numpy())
    if build == "timed":
        assert [ticks[f"k{k}"] for k in range(len(c.kernels))] == [4 * k.iterations for k in c.kernels]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_token_counts_of_kernels(name: str, i: int) -> None:
    """What the depth analysis relies on: demands rise, end within the input, and have one entry per output word."""
    for c in (c for c in KERNEL_CASES if c.name.startswith(f"{name}-{i}-")):
        for kernel in c.kernels:
            for need, x in zip(kernel.demand(), kernel.inputs, strict=True):
                assert len(need) == kernel.output.words
                assert (np.diff(need) >= 0).all()
                assert need[-1] <= x.words


@pytest.mark.parametrize(("name", "i"), CASES)
def test_words_that_are_read(name: str, i: int) -> None:
    """What the solver is told without a call is what the first kernel of the call reads."""
    op, types = case(name, i)
    y = op.infer(*types)
    for f in _kernels.foldings(op, types):
        assert op.reads(types, y, f) == op.hls(types, y, f).kernels[0].inputs


@pytest.mark.parametrize("name", COMPUTED)
def test_illegal_folding_is_a_graph_error(name: str) -> None:
    from quantlib.schedule import Folding

    op, types = case(name, 0)
    with pytest.raises(GraphError, match="pe = 1009 must divide"):
        op.hls(types, op.infer(*types), Folding(1009, 1))
