"""Where maps lie: formats against single bits, allocation, and blocks that cover every tile once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.ir import IntType
from quantlib.layerwise import engine, image, steps
from quantlib.layerwise.formats import FRACTIONS, SIGNS, Format, Layout, format_of, pack, unpack


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    bits, shift = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])), draw(st.integers(0, 3))
    sizes = draw(st.integers(1, 70)), draw(st.integers(1, 3)), draw(st.integers(1, 19))
    return Layout(*sizes, Format(bits, shift if bits < 64 else 0, draw(st.integers(-9, 9)) if bits < 64 else -(2**62)))


def values_in(layout: Layout, images: int, seed: int) -> np.ndarray:
    f, r = layout.format, np.random.default_rng(seed)
    fields = r.integers(0, min(2**f.bits, 2**63 - 1), (images, layout.channels, layout.height, layout.width), dtype=np.uint64)
    return (fields << np.uint64(f.shift)).astype(np.int64) + f.bias


def bit(data: np.ndarray, layout: Layout, c: int, y: int, x: int, k: int) -> int:
    """Bit k of a field, from the sentence in the documentation: group, row, vector, then planes of 32 bits or fields side by side."""
    bits = layout.format.bits
    row = (c // 32 * layout.height + y) * layout.pitch * 512
    at = row + x * 32 * bits + (k * 32 + c % 32 if bits <= 2 else c % 32 * bits + k)
    return int(data[at // 8]) >> at % 8 & 1


@given(layouts(), st.integers(0, 2**32))
def test_every_bit_lies_where_the_layout_says(layout: Layout, seed: int) -> None:
    values = values_in(layout, 2, seed)
    data = pack(values, layout)
    assert data.shape == (2, layout.words * 64)
    assert np.array_equal(unpack(data, layout), values)
    f, r = layout.format, np.random.default_rng(seed)
    for _ in range(20):
        n, c, y, x = (int(r.integers(0, s)) for s in values.shape)
        field = (int(values[n, c, y, x]) - f.bias) >> f.shift
        assert [bit(data[n], layout, c, y, x, k) for k in range(f.bits)] == [field >> k & 1 for k in range(f.bits)]


@given(st.integers(-(2**61), 2**61), st.integers(1, 2**20), st.integers(1, 12))
def test_formats_hold_their_interval_and_are_the_narrowest(lo: int, levels: int, step: int) -> None:
    t = IntType((1,), lo, lo + (levels - 1) * step, 1.0, step)
    f = format_of(t)
    codes = {(n - f.bias) >> f.shift for n in (t.lo, t.hi, t.lo + step * (levels // 2))}
    assert all((c << f.shift) + f.bias in (t.lo, t.hi, t.lo + step * (levels // 2)) and 0 <= c < 2**f.bits for c in codes)
    assert f.bits == 1 or (t.hi - t.lo) >> f.shift >= 2 ** (f.bits // 2)


def test_signs_and_fractions_are_planes() -> None:
    assert format_of(IntType((3,), -1, 1, 1.0, 2)) == SIGNS
    assert format_of(IntType((3,), -3, 3, 1.0, 2)) == FRACTIONS


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The driver's packing, with an empty project around it."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.json").write_text('{"engine": {}}')
    source = Path(steps.__file__).parent / "templates" / "driver.py"
    (folder / "driver.py").write_text(source.read_text())
    had = sys.modules.get("host")
    sys.modules["host"] = SimpleNamespace(Accelerator=object)  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location("layerwise_driver", folder / "driver.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    del sys.modules["host"]
    if had is not None:
        sys.modules["host"] = had
    return module


@given(layout=layouts(), seed=st.integers(0, 2**32))
def test_the_driver_packs_alike(host: ModuleType, layout: Layout, seed: int) -> None:
    values, f = values_in(layout, 2, seed), layout.format
    shape = (layout.channels, layout.height, layout.width)
    edge = dict(zip(("channels", "height", "width"), shape)) | {"shape": shape, "pitch": layout.pitch}
    edge |= {"bits": f.bits, "shift": f.shift, "bias": f.bias}
    data = pack(values, layout)
    assert np.array_equal(host.pack(values, edge), data)
    assert np.array_equal(host.unpack(data, edge), values)


@pytest.mark.parametrize("seed", range(12))
def test_maps_that_live_at_the_same_time_never_overlap(nets: ModuleType, seed: int) -> None:
    made = steps.build(nets.tangle(seed)[0])
    memory = image.allocate(made)
    written = {edge: k for k, step in enumerate(made.steps) for edge in step.stores}
    last = dict(written)
    for k, step in enumerate(made.steps):
        read = {s.edge for s in (step.reads.sources if step.reads else ())}
        read |= {s.edge for m in step.micros if m.code == "LOAD" for s in m.sources}
        assert all(written.get(edge, -1) < k for edge in read), "a map is read before it is written"
        last |= dict.fromkeys(read & set(written), k)
    arena = {e: (a, a + made.maps[e].words) for e, a in memory.maps.items() if a < image.IN_SLOT}
    assert set(arena) | {e for e, a in memory.maps.items() if a >= image.IN_SLOT} == set(made.maps)
    for a in arena:
        assert arena[a][1] <= memory.arena
        for b in arena:
            if a < b and written[a] <= last[b] and written[b] <= last[a]:
                assert arena[a][1] <= arena[b][0] or arena[b][1] <= arena[a][0], (a, b)
    slots = sorted((a - image.IN_SLOT, a - image.IN_SLOT + made.maps[e].words) for e, a in memory.maps.items() if a >= image.IN_SLOT)
    assert slots[0][0] == 0 and slots[-1][1] == memory.slot
    assert all(a[1] == b[0] for a, b in zip(slots, slots[1:], strict=False))


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([64, 128]), st.integers(1, 6))
def test_blocks_cover_every_tile_once(height: int, width: int, stride: int, rows: int, block: int, room: int) -> None:
    layout = Layout(40, height, width, FRACTIONS)
    window = steps.Window((3, 3), (stride, stride), (1, 1))
    out = (height - 1) // stride + 1, (width - 1) // stride + 1
    step = steps.Step("c", (35, *out), "XNOR", reads=steps.Place(layout, ()), window=window)
    e = engine.Engine(xnor_rows=rows, block=block, xnor_tile=2 * width * room)
    t = engine.tiling(step, e)
    if t is None:
        assert engine.span(step, 1) > e.xnor_tile // (2 * width) * e.xnor_banks  # not even one row fits
        return
    assert engine.span(step, t.tile_rows) <= e.xnor_tile // (2 * width) * e.xnor_banks
    assert t.block_rows * t.block_cols <= block and (t.block_cols == out[1] or t.block_cols % 16 == 0)
    assert t.together <= rows and (stride * t.together <= e.xnor_banks or stride % 2)
    cells = 0
    for _, tall in engine.tiles(step, t):
        cells += sum(r * c * often for r, c, often in engine.blocks(step, t, tall))
    assert cells == out[0] * out[1]
