"""Costs of a supernet: the published terms and figures, expectations, our hardware model."""

from __future__ import annotations

import itertools
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search import nets
from torch import nn

import quantlib as ql
import zoo
from quantlib.ops.conv2d import Conv2d
from quantlib.ops.dense import Dense
from quantlib.packing import factor_published, factor_safe
from quantlib.parts import part
from quantlib.schedule import Folding
from quantlib.search import MixedActivation, SearchError, costs, figures, layers, make_bits, read_bits, split_parameters, supernet

NETWORKS = {
    "vggtiny": "vggtiny_cifar10",
    "ultranet": "ultranet_dacsdc",
    "ultranet_bypass": "ultranet_bypass_dacsdc",
    "skynet": "skynet_dacsdc",
    "skynetk5": "skynetk5_dacsdc",
}
TERMS = {"complexity_loss": costs.complexity, "complexity_loss_trivial": costs.complexity_trivial, "bram_loss": costs.bram}
EQUAL_ALPHAS = {"vggtiny": 1195.903, "ultranet": 125.040, "ultranet_bypass": 143.509, "skynet": 5105.752, "skynetk5": 1961.565}  # spec


def network(short: str) -> nn.Module:
    name = NETWORKS[short]
    return supernet(zoo.get(name), input_shape=zoo.card(name).input_shape, fixed="linear" if short == "vggtiny" else ())


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return supernet(nets.Branches(), input_shape=nets.SHAPE, bits=(2, 3, 5), fixed="added")


@pytest.mark.parametrize("short", NETWORKS)
def test_published_terms_gradients_bits_and_figures(short: str, shared: Path) -> None:
    z = np.load(shared / "golden" / "mixq_complexity.npz")
    net = network(short)
    found = layers(net)
    acts: list[Any] = [m.inputs[0] for m in found]
    assert float(costs.complexity(net).detach()) == pytest.approx(EQUAL_ALPHAS[short], rel=1e-5)  # the reference is float32
    for init in ("init", "random", "sharp"):
        prefix = f"{short}.{init}."
        groups = {"alpha_weight": [m.alpha_weight for m in found], "alpha_activ": [a.alpha_activ for a in acts]}
        for kind, alphas in groups.items():
            for alpha, value in zip(alphas, z[prefix + kind], strict=True):
                alpha.data.copy_(torch.from_numpy(value))
        terms = {k: c for k, c in TERMS.items() if prefix + k in z.files}
        assert len(terms) == (2 if short == "vggtiny" else 3)
        for name, cost in terms.items():
            net.zero_grad()
            value = cost(net)
            value.backward()
            assert float(value.detach()) == pytest.approx(float(z[prefix + name]), rel=1e-5)  # the reference is float32
            for kind, alphas in groups.items():
                expected = z[f"{prefix}{name}.grad_{kind}"]
                got = np.stack([a.grad.numpy() for a in alphas if a.grad is not None])
                assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # likewise
        bits = read_bits(net)
        assert (bits.bitw, bits.bita) == (str(z[prefix + "bestw"]), str(z[prefix + "besta"]))
        ours = figures(net)
        theirs = {k.rpartition(".")[2]: float(z[k]) for k in z.files if k.startswith(prefix + "arch.")}
        assert {k: ours[k] for k in theirs} == pytest.approx(theirs, rel=1e-5)  # likewise
        assert figures(net, make_bits(net, bits.bitw, bits.bita)) == ours


@given(st.integers(0, 10_000))
def test_an_expectation_is_the_sum_over_all_choices(tiny: nn.Module, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiny.double()
    for alpha in split_parameters(tiny)[1]:
        alpha.data.copy_(torch.from_numpy(rng.normal(size=len(alpha)) * 2))
    table = rng.normal(size=(9, 9, 9))
    cost = costs.Cost("any", lambda layer, w, a: float(table[len(layer.name), w, a]), lambda first: 3.0)
    expected = 0.0
    for mixed in layers(tiny):
        p = torch.softmax(mixed.alpha_weight.detach(), 0).numpy()
        for source in mixed.inputs:
            q = {source: 1.0} if isinstance(source, int) else dict(zip(source.bits, torch.softmax(source.alpha_activ.detach(), 0).tolist()))
            for (i, w), (a, share) in itertools.product(enumerate(mixed.bits), q.items()):
                expected += 3 * p[i] * share / len(mixed.inputs) * table[len(mixed.name), w, a]
    assert float(cost(tiny).detach()) == pytest.approx(expected, rel=1e-12, abs=1e-12)  # float64 sums in another order
    alphas = split_parameters(tiny)[1]
    exact = torch.autograd.grad(cost(tiny), alphas, allow_unused=True)
    one = next(i for i, g in enumerate(exact) if g is not None)
    with torch.no_grad():
        alphas[one][0] += 1e-6
        up = float(cost(tiny))
        alphas[one][0] -= 2e-6
        down = float(cost(tiny))
    gradient = exact[one]
    assert gradient is not None and (up - down) / 2e-6 == pytest.approx(float(gradient[0]), rel=1e-5, abs=1e-7)  # a finite difference


@pytest.mark.parametrize("kind", nets.KINDS)
def test_costs_with_sharp_shares_are_those_of_the_bits(kind: str) -> None:
    net = supernet(nets.KINDS[kind](), input_shape=nets.SHAPE).double()
    rng = np.random.default_rng(1)
    for alpha in split_parameters(net)[1]:
        alpha.data.copy_(torch.from_numpy(rng.permutation(len(alpha)) * 1e4))
    for cost in (costs.complexity, costs.complexity_trivial, costs.bram, costs.bit_operations, costs.micronet, costs.packing(factor_safe)):
        assert float(cost(net).detach()) == pytest.approx(cost.at(net), rel=1e-12)  # float64 sums in another order
    numbers = figures(net)
    for name in ("bitops", "bita", "bitw", "dsps"):
        assert numbers[f"mix{name}"] == pytest.approx(numbers[name], rel=1e-12)  # likewise


def test_a_sum_of_costs() -> None:
    net = supernet(nets.scaled(), input_shape=nets.SHAPE)
    both = costs.total(net, {costs.complexity: 2.0, costs.bram: 0.5})
    # one float32 sum against two
    assert float(both.detach()) == pytest.approx(2 * float(costs.complexity(net).detach()) + 0.5 * float(costs.bram(net).detach()))
    assert float(costs.total(net, {})) == 0


def test_bit_operations_and_micronet_by_other_routes() -> None:
    """Of the fixed-bit model: counted by `ql.analysis`, which knows nothing of supernets."""
    net = supernet(nets.scaled(), input_shape=nets.SHAPE)
    for weights, acts in (("444", "844"), ("258", "573")):
        bits = make_bits(net, weights, acts)
        plain = ql.search.fixed(net, bits).eval()
        rows = {r.name: r for r in ql.analysis.micronet_cost(plain, nets.SHAPE).rows}
        score = sum(rows[n].weights / (6.9e6 * 32) + (rows[n].multiplications + rows[n].additions) / (1170e6 * 32) for n in bits.names)
        assert costs.micronet.at(net, bits) == pytest.approx(score, rel=1e-12)  # exact integers on one side, floats on ours
        macs = {"1": 6 * 27 * 64, "4": 6 * 9 * 64, "9": 96 * 5}
        by_hand = sum(macs[n] * w * a for n, w, a in zip(bits.names, bits.weight_bits, bits.act_bits)) * 1e-6
        assert costs.bit_operations.at(net, bits) == pytest.approx(by_hand, rel=1e-12)  # likewise


def test_micronet_of_the_challenge_s_numbers() -> None:
    layer = ql.search.Geometry("c", 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, (10, 10), (10, 10))
    sums = ceil(log2(15 * 14 * 9 * 32))
    assert costs.micronet.price(layer, 4, 4) == 4608 * 4 / (6.9e6 * 32) + 460_800 * (4 + sums) / (1170e6 * 32)


def test_costs_that_have_no_answer_say_where() -> None:
    net = supernet(nets.scaled(), input_shape=nets.SHAPE, bits=(4, 9))
    with pytest.raises(SearchError, match="1: the published packing tables have kernels 1, 3, 5 and 2 to 8 bits.*use factor_safe"):
        costs.complexity(net)
    assert float(costs.packing(factor_safe)(net).detach()) > 0


# Our hardware model.


def test_hardware_prices_are_the_ops_own() -> None:
    """One layer at one width: some folding of the real integer op, within the cycles, cheapest by shares of the budget."""
    device, cycles = part("xczu3eg"), 40_000
    budget = device.budget()
    rng = np.random.default_rng(0)
    for linear, w, a in itertools.product((False, True), (2, 7), (3, 8)):
        weight = rng.integers(-(2 ** (w - 1)), 2 ** (w - 1), (24, 12) if linear else (24, 12, 3, 3))
        weight.flat[:2] = -(2 ** (w - 1)), 2 ** (w - 1) - 1
        op: Any = Dense(weight) if linear else Conv2d(weight, padding=(1, 1, 1, 1))
        x = ql.ir.IntType((12,) if linear else (12, 10, 9), 0, 2**a - 1)
        y = op.infer(x)
        size = ((1, 1), (1, 1)) if linear else ((10, 9), (10, 9))
        kernel, padding = ((1, 1), (0, 0)) if linear else ((3, 3), (1, 1))
        layer = ql.search.Geometry("l", 12, 24, kernel, (1, 1), padding, (1, 1), 1, *size, linear=linear)
        folding, taken, took = costs._cheapest(layer, w, a, device, cycles)
        real = op.cost((x,), y, folding)
        assert took == real.cycles <= cycles
        usage = dict(zip(("lut", "ff", "dsp", "bram18", "uram"), taken))
        assert (usage["dsp"], usage["bram18"], usage["uram"]) == (real.dsp, real.bram18, real.uram)
        assert real.lut <= usage["lut"] <= real.lut * 1.1 + 64  # the accumulator is sized for any weights of this width, not for these
        for pe, simd, taps in op.folds((x,), y):
            other = op.cost((x,), y, Folding(pe, simd, taps=taps))
            if other.cycles <= cycles:
                share = sum(getattr(other, r) / max(budget[r], 1e-9) for r in budget)
                assert sum(usage[r] / max(budget[r], 1e-9) for r in budget) <= share * 1.1 + 1e-2  # the same allowance


def test_hardware_counts_every_layer_and_falls_with_the_bits() -> None:
    net = supernet(nets.scaled(), input_shape=nets.SHAPE, fixed="9")
    cost = costs.hardware("xc7z020", fps=20_000)
    usage = cost.usage(net)
    assert set(usage) == {"lut", "ff", "dsp", "bram18", "uram"}
    budget = part("xc7z020").budget()
    shares = {r: float(usage[r].detach()) / budget[r] for r in usage if budget[r]}
    assert float(cost(net).detach()) == pytest.approx(max(shares.values()))  # divided in float32 and in float64
    cost(net).backward()
    assert all(m.alpha_weight.grad is not None for m in layers(net))
    alone = costs.hardware("xc7z020", fps=20_000, resource="dsp")
    assert float(alone(net).detach()) == pytest.approx(shares["dsp"])  # likewise

    def at(bits: int) -> float:
        with torch.no_grad():
            for m in net.modules():
                alpha = getattr(m, "alpha_activ", None) if isinstance(m, MixedActivation) else getattr(m, "alpha_weight", None)
                if alpha is not None:
                    alpha.copy_((torch.arange(2, 9) == bits) * 1e4)
            return float(alone(net))

    assert at(8) > at(4) == 0  # the formulas put products with a factor below 6 bits into LUTs
    (kept,) = net.kept_layers  # type: ignore[union-attr, misc]
    assert (kept.geometry.name, kept.weight_bits, kept.act_bits) == ("9", 8, 4)
    own = [costs._cheapest(m.geometry(), 4, 4, part("xc7z020"), cost.cycles)[1][0] for m in layers(net)]
    theirs = costs._cheapest(kept.geometry, 8, 4, part("xc7z020"), cost.cycles)[1][0]
    assert float(cost.usage(net)["lut"].detach()) == sum(own) + theirs


def test_hardware_refuses_what_is_not_there() -> None:
    with pytest.raises(LookupError, match="no part or board is called"):
        costs.hardware("xc1")
    with pytest.raises(ValueError, match="has no 'uram' to give; there are lut, ff, dsp, bram18"):
        costs.hardware("xc7z020", resource="uram")
    with pytest.raises(ValueError, match="must be positive"):
        costs.hardware(fps=0)


def test_the_published_table_is_the_one_used() -> None:
    layer = ql.search.Geometry("c", 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, (1000, 1000), (1000, 1000))
    for w, a in itertools.product(range(2, 9), repeat=2):
        assert costs.complexity.price(layer, w, a) == 9.0 / factor_published(3, w, a)
