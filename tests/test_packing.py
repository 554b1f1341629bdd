"""Packings of a DSP slice: the published table, and proofs that packed multiply-accumulate and unpacking is exact."""

from __future__ import annotations

import csv
import doctest
import itertools
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlib.packing
from quantlib.packing import (
    DSPS,
    PUBLISHED_ODD_CELL,
    Packing,
    candidates,
    factor_published,
    factor_safe,
    factor_signed,
    multiply_accumulate,
    plot,
    search,
    table,
)

CELLS = list(itertools.product((1, 3, 5), range(2, 9), range(2, 9)))
COUNTED = [(k, w, a) for k in (1, 3, 5, 7) for w in (1, 2, 3, 5, 8) for a in (1, 2, 4, 5, 8)]


@pytest.fixture(scope="module")
def published(shared: Path) -> list[dict[str, str]]:
    with (shared / "golden" / "dsp_packing_upstream.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cell(row: dict[str, str]) -> tuple[int, int, int]:
    return int(row["kernel"]), int(row["w_bits"]), int(row["a_bits"])


def test_every_column_of_the_published_table(published: list[dict[str, str]]) -> None:
    assert [cell(r) for r in published] == CELLS
    odd = []
    for row in published:
        c = cell(row)
        p, safe = search(*c, rule="published"), search(*c)
        numbers = (p.weight_parts, p.act_parts, p.act_port, p.acts, p.weights, p.stride_min, p.stride_max)
        columns = ("w_split", "a_split", "act_port_bits", "n_act", "n_wgt", "stride_min", "stride_max")
        assert (p.scheme, *numbers) == (row["scheme"], *(int(row[n]) for n in columns)), c
        assert (safe.scheme, round(float(safe.macs), 6)) == (row["scheme_safe"], float(row["factor_safe"]))  # the table has six decimals
        assert round(float(p.macs), 6) == float(row["factor_formula"])
        assert round(float(factor_signed(*c)), 6) == float(row["factor_signed_fullrange_nosplit"])
        assert round(float(factor_signed(*c, lowest=False)), 6) == float(row["factor_signed_symmetric_nosplit"])
        assert factor_published(*c) == float(row["factor_upstream"])
        if round(float(p.macs), 2) != float(row["factor_upstream"]):
            odd.append(c)
    assert odd == [(1, 2, 3)] == list(PUBLISHED_ODD_CELL)


def test_figures_that_vendors_and_papers_name() -> None:
    assert factor_safe(1, 8, 8, "dsp48e2") == 2  # two 8-bit products: WP486, there with a shared operand
    assert factor_safe(1, 4, 4, "dsp48e2") == 4  # four 4-bit products: arXiv 2203.11028
    assert search(3, 4, 4).acts * search(3, 4, 4).weights == 6  # 4-bit packing 3 x 2 of DeepBurning-MixQ's accelerator
    assert factor_safe(3, 4, 4, "dsp48e1") <= factor_safe(3, 4, 4, "dsp48e2") <= factor_safe(3, 4, 4, "dsp58")


def by_hand(p: Packing, acts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sums a packing stands for, product by product: a 1-D convolution, or an outer product."""
    n = acts.shape[:-2]
    out = np.zeros((*n, p.fields), np.int64)
    for i in range(p.acts):
        for j in range(p.weights):
            if p.scheme == "conv":
                m = i + j
            else:  # the operand on the narrow port runs fastest
                m = i + p.acts * j if p.act_port == p.dsp.narrow else j + p.weights * i
            out[..., m] += (acts[..., i] * weights[..., j]).sum(-1)
    return out


def corners(p: Packing, rng: np.random.Generator, n: int, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Operands (trials, n, ...) of lowest and highest codes, of both ends with their neighbours, and of any codes."""
    half = 2 ** (p.weight_bits - 1)
    a_ends, w_ends = np.array([0, 2**p.act_bits - 1]), np.array([-half, half - 1])
    a_more, w_more = (
        np.clip([0, 1, 2**p.act_bits - 2, 2**p.act_bits - 1], 0, None),
        np.clip([-half, 1 - half, -1, 0, half - 1], -half, half - 1),
    )
    a, w = (trials, n, p.acts), (trials, n, p.weights)
    acts = [rng.choice(a_ends, a), rng.choice(a_more, a), rng.integers(0, 2**p.act_bits, a), np.full((1, *a[1:]), 2**p.act_bits - 1)]
    weights = [rng.choice(w_ends, w), rng.choice(w_more, w), rng.integers(-half, half, w), np.full((1, *w[1:]), -half)]
    return np.concatenate(acts), np.concatenate(weights)


def every_corner(p: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Each operand at its lowest or highest code, all combinations, one packed product each (at most 2^14 of them)."""
    count = p.acts + p.weights
    bits = np.arange(2**count) if count <= 14 else np.random.default_rng(0).integers(0, 2**count, 2**14)
    on = bits[:, None] >> np.arange(count) & 1
    half = 2 ** (p.weight_bits - 1)
    return (on[:, : p.acts] * (2**p.act_bits - 1))[:, None], np.where(on[:, p.acts :] > 0, half - 1, -half)[:, None]


@pytest.mark.parametrize("dsp", DSPS)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_corners_of_the_best_packing_at_every_stride(dsp: str, kernel: int) -> None:
    rng = np.random.default_rng(kernel)
    for w, a in [(w, a) for w in range(1, 9) for a in range(1, 9)]:
        best = search(kernel, w, a, dsp)
        assert best.fits()
        for stride in range(best.stride_min, best.stride_max + 1):
            p = best.at(stride)
            assert p.depth() >= 1
            acts, weights = every_corner(p)
            assert np.array_equal(multiply_accumulate(p, acts, weights), by_hand(p, acts, weights)), p
            for trick in {p.overlap, True}:  # with the trick twice as many may be summed
                n = min(p.depth(trick), 40)
                acts, weights = corners(p, rng, n, 6)
                assert np.array_equal(multiply_accumulate(p, acts, weights, trick), by_hand(p, acts, weights)), (p, n)


@pytest.mark.parametrize("trick", [False, True])
def test_sums_of_extremes_as_deep_as_they_may_be(trick: bool) -> None:
    deepest = 0
    for (kernel, w, a), dsp in itertools.product(COUNTED, DSPS):
        p = search(kernel, w, a, dsp)
        n = p.depth(trick)
        deepest = max(deepest, n)
        if not n:
            continue
        half, rows = 2 ** (w - 1), np.ones((3, n, 1), np.int64)
        acts = rows * np.full(p.acts, 2**a - 1)
        weights = rows * np.full(p.weights, -half)
        weights[1], weights[2, :, ::2] = half - 1, half - 1  # all lowest, all highest, neighbours of both
        assert np.array_equal(multiply_accumulate(p, acts, weights, trick), by_hand(p, acts, weights)), (p, n)
    assert deepest >= 256


def every_operand(p: Packing) -> tuple[np.ndarray, np.ndarray] | None:
    """Every code of every operand of one packed product, where there are at most 2^14 of them."""
    bits = p.acts * p.act_bits + p.weights * p.weight_bits
    if bits > 14:
        return None
    codes = np.arange(2**bits)
    acts = codes[:, None] >> (p.act_bits * np.arange(p.acts)) & (2**p.act_bits - 1)
    weights = codes[:, None] >> (p.acts * p.act_bits + p.weight_bits * np.arange(p.weights)) & (2**p.weight_bits - 1)
    return acts[:, None], weights[:, None] - 2 ** (p.weight_bits - 1)


def test_all_operands_of_small_packings() -> None:
    seen = 0
    for p in {search(*c, dsp, rule) for c in COUNTED for dsp in DSPS for rule in ("safe", "published")}:
        if (operands := every_operand(p)) is None:
            continue
        seen += 1
        got = multiply_accumulate(p.at(p.stride_min), *operands, check=False)
        assert np.array_equal(got, by_hand(p.at(p.stride_min), *operands)), p
    assert seen > 30


def test_published_settings_are_exact_where_ports_allow() -> None:
    """The published words unpack exactly in themselves; but not all of them fit a signed port, which is what `safe` is for."""
    leave = 0
    for c in CELLS:
        p = search(*c, rule="published")
        acts, weights = every_corner(p)
        assert np.array_equal(multiply_accumulate(p, acts, weights, check=False), by_hand(p, acts, weights))
        if not p.fits():
            leave += 1
            with pytest.raises(OverflowError, match="signed bits"):
                multiply_accumulate(p, *every_corner(p))
    assert leave == 95


@settings(max_examples=150)
@given(st.data())
def test_any_packing_of_any_rule_sums_up_to_its_depth(data: st.DataObject) -> None:
    kernel, w, a = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 10)), data.draw(st.integers(1, 10))
    depth = data.draw(st.integers(1, 12))
    found = list(candidates(kernel, w, a, data.draw(st.sampled_from(list(DSPS))), depth=depth))
    if not found:
        return
    p = data.draw(st.sampled_from(found))
    p = p.at(data.draw(st.integers(p.stride_min, p.stride_max)))
    assert p.depth(True) >= depth
    trick = data.draw(st.sampled_from(sorted({True, p.overlap})))
    n = data.draw(st.integers(1, min(p.depth(trick), 64)))
    acts, weights = corners(p, np.random.default_rng(data.draw(st.integers(0, 2**32))), n, 3)
    assert np.array_equal(multiply_accumulate(p, acts, weights, trick), by_hand(p, acts, weights))


def test_one_product_more_than_the_depth_can_fail() -> None:
    """The limit n * terms <= 2^guard is sharp: one packed product more gives a wrong sum for some operands."""
    p = search(3, 4, 4).at(10)
    n = p.depth(False)
    assert n * p.terms == 2**p.guard
    acts, weights = np.full((n + 1, p.acts), 15), np.full((n + 1, p.weights), -8)
    with pytest.raises(OverflowError, match=f"{n + 1} packed products are summed, and {n} may be"):
        multiply_accumulate(p, acts, weights, overlap=False)
    wrong = multiply_accumulate(p, acts, weights, overlap=False, check=False)
    assert not np.array_equal(wrong, by_hand(p, acts, weights))
    assert np.array_equal(multiply_accumulate(p, acts, weights, overlap=True), by_hand(p, acts, weights))


def test_the_search_finds_what_trying_everything_finds() -> None:
    """Counted again without any bound on the numbers of values, from the inequalities of the rule."""
    for kernel, w, a in COUNTED:
        best = Fraction(0)
        for ws, as_ in ((1, 1), (2, 1), (1, 2)):
            if (ws == 2 and w == 1) or (as_ == 2 and a == 1):
                continue
            wb, ab = -(-w // ws), -(-a // as_)
            for (pa, pw), n, k in itertools.product(((26, 17), (17, 26)), range(1, 28), range(1, 28)):
                s = wb + ab + (min(n, k) - 1).bit_length() - 1
                if k <= kernel and (n - 1) * s + ab <= pa and (k - 1) * s + wb <= pw:
                    best = max(best, Fraction(kernel * n, -(-kernel // k)) / (ws * as_))
                s = wb + ab - 1
                sa, sw = (s, n * s) if pa == 17 else (k * s, s)
                if (n - 1) * sa + ab <= pa and (k - 1) * sw + wb <= pw:
                    best = max(best, Fraction(n * k) / (ws * as_))
        assert factor_safe(kernel, w, a) == best


def test_errors_say_what_would_work() -> None:
    with pytest.raises(LookupError, match="no DSP slice is called 'dsp1'; there are dsp48e1, dsp48e2, dsp58"):
        search(3, 4, 4, "dsp1")
    with pytest.raises(LookupError, match="there are published, safe"):
        search(3, 4, 4, rule="bold")
    with pytest.raises(ValueError, match="must be at least 1"):
        search(0, 4, 4)
    with pytest.raises(ValueError, match="fewer bits or a smaller depth do"):
        search(1, 60, 60)
    with pytest.raises(ValueError, match="use factor_safe"):
        factor_published(7, 4, 4)
    with pytest.raises(ValueError, match="a stride of 40 bits: 8..11 fit the ports of dsp48e2"):
        search(3, 4, 4).at(40)
    with pytest.raises(ValueError, match="outside 4 unsigned bits"):
        multiply_accumulate(search(3, 4, 4), np.full((1, 2), 16), np.zeros((1, 3)))


def test_the_page_holds_the_tables(root: Path) -> None:
    page = (root / "docs" / "packing.md").read_text(encoding="utf-8")
    for dsp, kernel in itertools.product(DSPS, (1, 3, 5)):
        assert table(kernel, dsp) in page, f"put quantlib.packing.table({kernel}, {dsp!r}) into docs/packing.md"


def test_the_page_s_examples_print_what_they_say(root: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (root / "docs" / "packing.md").read_text(encoding="utf-8"), re.S))
    said = re.findall(r"print\(.*\) +# ([^:\n]*)", code)
    assert len(said) == code.count("print(")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == said, done.stderr


def test_docstrings_run() -> None:
    assert doctest.testmod(quantlib.packing).failed == 0


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot(tmp_path / "packing.png", kernels=(1, 3), bits=range(2, 5))
    assert path.read_bytes()[:4] == b"\x89PNG" and [p.name for p in tmp_path.iterdir()] == ["packing.png"]
