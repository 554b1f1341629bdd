"""The faster steps of the torch carriers equal each op's own `evaluate` in every integer, and are taken only where they are proven."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlib import carriers, ops
from quantlib.ir import IntType
from quantlib.ops import Op

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def every_integer(t: IntType) -> np.ndarray:
    """(P, C, 1, 1): every integer of the interval in every channel."""
    return np.broadcast_to(np.arange(t.lo, t.hi + 1, t.step)[:, None, None, None], (t.levels, t.shape[0], 1, 1)).astype(np.float64)


def equal_everywhere(op: Op, t: IntType, dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Compares step and evaluate on every integer; says whether the step is another than evaluate."""
    x = torch.tensor(every_integer(t), dtype=dtype, device=device)
    step = carriers.step(op, (t,), dtype, device)
    before = x.clone()
    want = op.evaluate(torch.tensor(every_integer(t), dtype=torch.int64))
    assert torch.equal(step(x).to(torch.int64).cpu(), want)
    assert torch.equal(x, before), "an input was written"
    return step != op.evaluate


def regular(rng: np.random.Generator, channels: int, levels: int, span: int) -> np.ndarray:
    """Thresholds as a batch norm and a quantizer give them: the integers above a row of evenly spaced reals."""
    gap = rng.uniform(0.3, 2 * span / levels, (channels, 1))
    start = rng.uniform(-span, span, (channels, 1))
    return np.ceil(start + gap * np.arange(levels)).astype(np.int64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("levels", "step"), [(2, 1), (3, 2), (15, 1), (31, 1), (255, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regular_thresholds_become_a_line(levels: int, step: int, dtype: torch.dtype, device: torch.device) -> None:
    """Thresholds inside, at the ends of and beyond the interval, both directions."""
    rng = np.random.default_rng(levels)
    thresholds, sign = regular(rng, 24, levels, 900), rng.choice([-1, 1], 24)
    assert equal_everywhere(ops.Threshold(thresholds, sign, -levels * step, step), IntType((24, 1, 1), -700, 1000), dtype, device)


def test_channels_without_a_line_are_compared() -> None:
    rng = np.random.default_rng(0)
    thresholds = regular(rng, 20, 7, 300)
    thresholds[[3, 11]] = np.array([[-250, -249, -248, -10, 5, 200, 201], [-5, -5, -5, -5, 90, 91, 92]])
    for sign in (np.ones(1), np.where(np.arange(20) % 2, 1, -1)):
        assert equal_everywhere(ops.Threshold(thresholds, sign, 0), IntType((20, 1, 1), -310, 290), torch.float32)


def test_thresholds_without_any_line_are_left_to_the_op() -> None:
    squares = np.arange(1, 16)[None] ** 2
    assert not equal_everywhere(ops.Threshold(squares, np.ones(1), 0), IntType((3, 1, 1), -5, 300), torch.float32)
    assert not equal_everywhere(ops.Threshold(squares[:, :1], np.ones(1), 0), IntType((3, 1, 1), -5, 300), torch.float32)


@pytest.mark.parametrize("kinked", [False, True])
@pytest.mark.parametrize(("bits", "shift"), [(2, 3), (8, 9), (14, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiply_shifts(bits: int, shift: int, kinked: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(bits)
    c, lo, hi = 12, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    mul, add = rng.integers(-40, 41, c), rng.integers(-(2**12), 2**12, c)
    mul[0] = 0
    other = (rng.integers(-300, 300, c), rng.integers(-40, 41, c), rng.integers(-999, 999, c)) if kinked else ()
    op = ops.Requant(mul, add, shift, lo, hi, *other)
    t = IntType((c, 1, 1), -1500, 1700)
    assert op.magnitude(t) < 1 << 24 and equal_everywhere(op, t, dtype)


def test_a_wide_multiply_shift_may_run_in_float32_where_it_is_proven() -> None:
    """Products beyond 2^24, few codes: a line in float32 that is right on every integer; with many codes there is none to prove."""
    t = IntType((5, 1, 1), -20000, 20000)
    factors = np.array([70_001, -90_007, 65_537, 3, 80_021])
    few, many = (ops.Requant(factors, np.arange(5) * 1000 - 77, 24, -(2**b), 2**b - 1) for b in (3, 14))
    assert few.magnitude(t) >= 1 << 24
    assert carriers.fits_float32(few, (t,)) and equal_everywhere(few, t, torch.float32)
    assert not carriers.fits_float32(ops.Requant(factors, np.zeros(5), 2, -(2**20), 2**20), (t,))
    step = carriers.step(many, (t,), torch.float32, CPU)
    assert step == many.evaluate or equal_everywhere(many, t, torch.float32)


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n in sorted(o.__name__ for o in carriers.FORMS) for i in range(len(Op.registry[n].examples()))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_examples_of_every_op_with_a_form(name: str, i: int, dtype: torch.dtype) -> None:
    op, types = Op.registry[name].examples()[i]
    bound = max(op.magnitude(*types), *(t.magnitude for t in types))
    if dtype is torch.float32 and bound >= 1 << 24:
        pytest.skip("this carrier does not hold it")
    rng = np.random.default_rng(i)
    codes = [torch.from_numpy(rng.integers(0, t.levels, (6, *t.shape)) * t.step + t.lo) for t in types]
    laid = [c.to(dtype).contiguous(memory_format=torch.channels_last) if c.dim() == 4 else c.to(dtype) for c in codes]
    got = carriers.step(op, types, dtype, CPU)(*laid)
    assert torch.equal(got.to(torch.int64), op.evaluate(*codes))


BYTES = {
    "signs": (-1, 1, 2),
    "two bits": (-3, 3, 2),
    "unsigned": (0, 15, 1),
    "byte": (0, 255, 1),
    "int8": (-128, 127, 1),
    "above": (3, 9, 1),
}


@pytest.mark.parametrize("bytes_work", [True, False])
@pytest.mark.parametrize("interval", BYTES)
@pytest.mark.parametrize("seed", range(5))
def test_convolutions_of_any_geometry(interval: str, seed: int, bytes_work: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bytes where oneDNN has them, float32 elsewhere: strides, dilation, one-sided padding, groups; extreme codes."""
    if not bytes_work:
        monkeypatch.setattr(carriers, "bytes_work", lambda: False)
    rng = np.random.default_rng([seed, *map(ord, interval)])
    groups, per_group, outputs = int(rng.choice([1, 2, 5])), int(rng.choice([1, 3, 16, 40])), int(rng.choice([1, 5, 16]))
    kernel, sides = rng.integers(1, 4, 2), [int(p) for p in rng.integers(0, 3, 2)]
    padding = (sides[0], sides[0], sides[1], sides[1]) if seed % 3 else (sides[0], 1, 0, sides[1])
    stride, dilation = ((int(rng.integers(1, 3)), int(rng.integers(1, 3))) for _ in range(2))
    weight = rng.integers(-128, 128, (outputs * groups, per_group, *kernel))
    weight[0] = 127
    op = ops.Conv2d(weight, stride, padding, dilation, groups)
    lo, hi, step = BYTES[interval]
    t = IntType((per_group * groups, 8, 9), lo, hi, step=step)
    codes = rng.integers(0, t.levels, (4, *t.shape))
    codes[0], codes[1] = 0, t.levels - 1
    x = torch.from_numpy(codes * step + lo)
    assert op.magnitude(t) < 1 << 24
    got = carriers.step(op, (t,), torch.float32, CPU)(x.float().contiguous(memory_format=torch.channels_last))
    assert torch.equal(got.to(torch.int64), op.evaluate(x))


def test_bytes_are_not_asked_to_hold_what_they_cannot() -> None:
    """Sums of 2^24 and codes of nine bits are left to the floats, whatever the machine."""
    far = IntType((600, 2, 2), 0, 255)
    weight = np.full((1, 600, 1, 1), 127)
    assert 255 * 127 * 600 >= 1 << 24
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    like = torch.empty(0)
    assert carriers._byte_convolution(weight, far, geometry, like) is None
    assert carriers._byte_convolution(weight[:, :100], IntType((100, 2, 2), 0, 256), geometry, like) is None
    assert carriers._byte_convolution(weight[:, :100] + 1, IntType((100, 2, 2), 0, 3), geometry, like) is None
    one_sided = ((1, 1), (0, 1, 0, 0), (1, 1), 1)
    assert carriers._byte_convolution(weight[:, :100], IntType((100, 2, 2), 0, 3), one_sided, like) is None


@pytest.mark.parametrize("seed", range(6))
def test_shifts_of_any_channels(seed: int) -> None:
    """Groups side by side and scattered, moves beyond the map, one move for all."""
    rng = np.random.default_rng(seed)
    channels = 1 if seed == 5 else 12
    dy, dx = rng.integers(-5, 6, channels), rng.integers(-2, 3, channels)
    if seed % 2:
        dy, dx = np.sort(dy // 3), np.zeros(channels, dtype=np.int64)
    op, t = ops.Shift(dy, dx), IntType((12, 4, 5), -9, 9)
    x = torch.from_numpy(rng.integers(-9, 10, (3, *t.shape)))
    for form in (torch.contiguous_format, torch.channels_last):
        got = carriers.step(op, (t,), torch.float32, CPU)(x.float().contiguous(memory_format=form))
        assert torch.equal(got.long(), op.evaluate(x))
