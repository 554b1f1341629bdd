"""The hardware's order of weights against the index formula of the published exporters, for any shape; words against their bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantlib.io.mixq_export import Layer, bits_of, hex_words, reordered


def layer(kind: str, k: int, ich: int, och: int, groups: int, size: int = 1) -> Layer:
    shape = (och, ich) if kind == "linear" else (och, ich // groups, k, k)
    w = np.random.default_rng(1).integers(-8, 8, shape)
    facts = {"n": 0, "type": kind, "k": k, "s": 1, "p": k // 2, "ich": ich, "och": och, "groups": groups, "irow": size, "icol": size}
    rest = {"orow": size, "ocol": size, "abit": 4, "astep": 1.0, "actq_class": "HWGQ", "wbit": 4, "w": w, "wstep": 1.0}
    return Layer(**facts, **rest, inc=np.arange(och), bias=np.arange(och) * 2)


sizes = st.integers(1, 3)


@given(k=st.sampled_from([3, 5]), inner=sizes, simd=sizes, pe=sizes, outer=sizes, actp=sizes, depthwise=st.booleans())
def test_windows(k, inner, simd, pe, outer, actp, depthwise):
    och = pe * outer * actp
    ich = och if depthwise else inner * simd
    groups, per_group = (och, 1) if depthwise else (1, ich)
    simd = k if depthwise else simd
    made = reordered(layer("conv", k, ich, och, groups), (simd, pe, actp, 1))
    w = layer("conv", k, ich, och, groups).w
    chunk = k * per_group // simd
    assert made.w.shape == (pe, k, och // pe * chunk, simd)
    for p, kc, at, s in np.ndindex(made.w.shape):
        g, c = divmod(at, chunk)
        kr, i = divmod(c * simd + s, per_group)
        assert made.w[p, kc, at, s] == w[g * pe + p, i, kr, kc]
    for values, source in ((made.inc, np.arange(och)), (made.bias, np.arange(och) * 2)):
        assert values.shape == (actp, och // actp)
        assert all(values[p, g] == source[g * actp + p] for p, g in np.ndindex(values.shape))


@given(inner=sizes, simd=sizes, pe=sizes, pep=sizes, outer=sizes)
def test_points(inner, simd, pe, pep, outer):
    ich, och = inner * simd, pe * pep * outer
    made = reordered(layer("conv", 1, ich, och, 1), (simd, pe, 1, pep))
    w = layer("conv", 1, ich, och, 1).w
    for p, at, lane in np.ndindex(made.w.shape):
        g, c = divmod(at, inner)
        s, q = divmod(lane, pep)
        assert made.w[p, at, lane] == w[(g * pe + p) * pep + q, c * simd + s, 0, 0]


@given(size=sizes, eights=sizes, pairs=sizes)
def test_the_linear_layer(size, eights, pairs):
    ich, och = 8 * eights * size * size, 2 * pairs
    made = reordered(layer("linear", 1, ich, och, 1, size), ())
    w = layer("linear", 1, ich, och, 1, size).w
    for _, h, c8, x, o2, c1, lane in np.ndindex(made.w.shape):
        assert made.w[0, h, c8, x, o2, c1, lane] == w[2 * o2 + lane, ((8 * c8 + c1) * size + h) * size + x]


@given(bits=st.integers(1, 9), rows=st.lists(st.lists(st.integers(-256, 255), min_size=3, max_size=3), min_size=1, max_size=5))
def test_words_hold_their_lanes(bits, rows):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    lanes = np.clip(np.array(rows), low, high)
    for row, word in zip(lanes.tolist(), hex_words(lanes, bits).tolist(), strict=True):
        assert word == word.lower() and word.startswith('"0x') and word.endswith('"')
        value = int(word.strip('"'), 16)
        fields = [(value >> (bits * lane)) & (2**bits - 1) for lane in range(3)]
        assert [f - 2**bits if f > high else f for f in fields] == row and value < 2 ** (3 * bits)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=4))
def test_a_signed_word_holds_every_value(values):
    bits = bits_of(np.array(values))
    assert all(-(2 ** (bits - 1)) <= v < 2 ** (bits - 1) for v in values)
    assert max(abs(v) for v in values) >= 2 ** (bits - 1) // 2
