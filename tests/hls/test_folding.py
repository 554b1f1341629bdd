"""Window positions per cycle: random convolutions and pools with random foldings, as numbers and as compiled kernels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from quantlib.hls.call import divisors
from quantlib.hls.window import Window
from quantlib.ir import GraphError, IntType
from quantlib.ops import Conv2d, FractionalConv2d, MaxPool, Op, SumPool
from quantlib.schedule import Folding


def _kernels_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tests_kernels", Path(__file__).with_name("kernels.py"))
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_kernels = _kernels_module()
KINDS = ("dense", "grouped", "depthwise", "binary", "fractional", "max", "sum")
X_TYPES = {"fractional": (-3, 3, 2), "binary": (-1, 1, 2)}


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[Op, IntType, Folding]:
    """An op of the kind with a window somewhere, on an edge it accepts, and a legal folding."""
    small = st.integers(1, 3)
    pair = st.tuples(small, small)
    kernel, stride = draw(pair), draw(pair)
    dilation = (1, 1) if kind in ("fractional", "sum") else draw(pair)
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    pools = kind in ("max", "sum")
    most = [min((k - 1) * d, (s - 1) // 2) if pools else 3 for k, d, s in zip(kernel, dilation, span)]
    t, b = (draw(st.integers(0, most[0])) for _ in range(2))
    left, right = (draw(st.integers(0, most[1])) for _ in range(2))
    size = [draw(st.integers(max(1, s - p - q), max(1, s - p - q) + 5)) for s, p, q in zip(span, (t, left), (b, right))]
    groups = draw(st.integers(2, 4)) if kind in ("grouped", "depthwise") else 1
    inner = 1 if kind == "depthwise" else draw(st.integers(1, 4))
    outer = 1 if kind == "depthwise" else draw(st.integers(1, 4))
    lo, hi, step = X_TYPES.get(kind, (draw(st.integers(-9, 0)), draw(st.integers(1, 9)), 1))
    x = IntType((inner * groups, *size), lo, hi, 1.0, step)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (outer * groups, inner, *kernel)
    signs = rng.choice([-1, 1], shape)
    padding = (t, b, left, right)
    op: Op
    if kind == "fractional":
        op = FractionalConv2d(signs, rng.integers(-6, 7, outer), stride, padding)
    elif kind == "max":
        op = MaxPool(kernel, stride, padding, dilation)
    elif kind == "sum":
        op = SumPool(kernel, stride, padding)
    else:
        weight = signs if kind == "binary" or draw(st.booleans()) else rng.integers(-9, 10, shape)
        op = Conv2d(weight, stride, padding, dilation, groups)
    try:
        limits = op.folds((x,), op.infer(x))
    except GraphError:  # a pool's window that sees padding only
        reject()
    lanes = draw(st.sampled_from(divisors(limits.pe))), draw(st.sampled_from(divisors(limits.simd)))
    return op, x, Folding(*lanes, taps=draw(st.sampled_from(limits.taps)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_counts(kind: str, data: st.DataObject) -> None:
    """Cycles of cost and kernels agree; demands rise, end within the input, and have one entry per output word."""
    op, x, folding = data.draw(cases(kind))
    y = op.infer(x)
    call = op.hls((x,), y, folding)
    assert op.cost((x,), y, folding).cycles == call.iterations
    assert call.kernels[-1].output.words * call.kernels[-1].output.lanes == y.numel
    for kernel in call.kernels:
        (need,) = kernel.demand()
        assert len(need) == kernel.output.words and (np.diff(need) >= 0).all() and 0 <= need[0] and need[-1] <= kernel.inputs[0].words


@st.composite
def windows(draw: st.DrawFn) -> Window:
    op, x, _ = draw(cases("max"))
    assert isinstance(op, MaxPool)
    taps = draw(st.sampled_from(op.folds((x,), op.infer(x)).taps))
    x = IntType((1, *x.shape[1:]), 0, 1)
    return Window(x, 1, 1, op.kernel, op.stride, op.padding, op.dilation, op.infer(x).shape[1:], taps=taps)


@settings(max_examples=60, deadline=None)
@given(windows())
def test_a_window_has_read_what_it_shows(w: Window) -> None:
    """By hand: every word comes after the last of its pixels inside the image."""
    (need,) = w.demand()
    _, height, width = w.x.shape
    k = 0
    for oy in range(w.out[0]):
        for ox in range(w.out[1]):
            for first in range(0, w.kernel[0] * w.kernel[1], w.taps):
                seen = 0
                for tap in range(first, first + w.taps):
                    u, v = divmod(tap, w.kernel[1]) if w.taps == 1 else divmod(tap, w.kernel[0])[::-1]
                    row = oy * w.stride[0] - w.padding[0] + u * w.dilation[0]
                    col = ox * w.stride[1] - w.padding[2] + v * w.dilation[1]
                    if 0 <= row < height and 0 <= col < width:
                        seen = max(seen, row * width + col + 1)
                assert need[k] >= seen
                k += 1
    assert k == len(need)


BUILDS = {"fast": ("-DQL_MODE=0",), "timed": ("-DQL_MODE=2", "-DQL_SYNTHESIS_BODIES")}


def check_compiled(drawn: list[tuple[Op, IntType, Folding]], folder: Path) -> None:
    """All cases in one translation unit per build: values of `evaluate`, iterations of the kernels' own count."""
    some: list[Any] = [_kernels.Case(f"{type(op).__name__}-{i}", op, (x,), f) for i, (op, x, f) in enumerate(drawn)]
    running = {name: _kernels.compile_cases(some, folder / name, flags) for name, flags in BUILDS.items()}
    for name, process in running.items():
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[:4000]
        library = _kernels.load(folder / name)
        for i, case in enumerate(some):
            t = case.types[0]
            x = torch.from_numpy(np.random.default_rng(i).integers(0, t.levels, (3, *t.shape)) * t.step + t.lo)
            got, ticks, blocked = _kernels.run(library, i, case, [x.numpy()])
            assert not blocked
            assert np.array_equal(got, case.op.evaluate(x).numpy()), (case.op, case.types, case.folding)
            if name == "timed":
                assert [ticks[f"k{k}"] for k in range(len(case.kernels))] == [3 * k.iterations for k in case.kernels]


compiled = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="kernels need a C++ compiler")
# Compiled once per example, so nothing is shrunk: the failing case is printed as it is.
once: dict[str, Any] = {"deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck), "database": None}


def every_kind(each: int) -> st.SearchStrategy[list[tuple[Op, IntType, Folding]]]:
    lists = [st.lists(cases(k), min_size=each, max_size=each) for k in KINDS]
    return st.tuples(*lists).map(lambda groups: [c for g in groups for c in g])


@compiled
@settings(max_examples=3, derandomize=True, **once)  # the first is the smallest there is
@given(every_kind(4))
def test_compiled_kernels(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Op, IntType, Folding]]) -> None:
    check_compiled(drawn, tmp_path_factory.mktemp("folding"))


@compiled
@pytest.mark.slow
@settings(max_examples=6, **once)
@given(every_kind(8))
def test_many_compiled_kernels(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Op, IntType, Folding]]) -> None:
    check_compiled(drawn, tmp_path_factory.mktemp("folding"))
