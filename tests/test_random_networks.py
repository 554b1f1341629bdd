"""Random small Brevitas networks: every integer code equals the model's, and compiled C++ equals ql.run."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import Spec, assert_exact, build, graph_fields_hold, specs

import quantlib as ql

# What convert may refuse in these networks: each is a limit of the integer semantics, with a remedy in its message.
REFUSALS = (
    r"real-valued join of wide operands",
    r"an average of real values that went through",
    r"an average whose zero padding stands beside",
    r"it works on the real-valued result of a join",
    r"does not commute with",
    r"its input channels have different scales",
    r"table would have \d+ entries",
    r"it needs integers, but its input is the real-valued result of",
    r"the join is not monotone|a join that is not known to be monotone",
    r"a step that is not known to be monotone follows an accumulator",
    r"output levels on an accumulator",
)


def graph_of(spec: Spec) -> tuple[torch.nn.Module, ql.Graph | None, str]:
    model = build(spec)
    try:
        return model, ql.convert(model, spec.shape, spec.grid), "exact"
    except ql.ConversionError as error:
        reason = next((r for r in REFUSALS if re.search(r, str(error))), None)
        assert reason is not None, f"refused for no listed reason: {error}"
        return model, None, reason


def conversions(count: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(specs())
    def check(spec: Spec) -> None:
        model, graph, outcome = graph_of(spec)
        outcomes[outcome] += 1
        if graph is not None:
            x = spec.images(5, torch.Generator().manual_seed(spec.seed + 1))
            assert_exact(model, graph, x, ties=None)
            graph_fields_hold(graph, x)

    check()
    return outcomes


def simulations(count: int, folder: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(specs())
    def check(spec: Spec) -> None:
        _, graph, outcome = graph_of(spec)
        outcomes[outcome] += 1
        if graph is not None:
            x = spec.images(3, torch.Generator().manual_seed(spec.seed + 2))
            want = ql.run(graph, x, integers=True)
            got = ql.export(graph, folder / f"network{sum(outcomes.values())}").csim(x, integers=True)
            assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)

    check()
    return outcomes


def assert_seldom_refused(outcomes: Counter[str]) -> None:
    total = sum(outcomes.values())
    assert outcomes["exact"] >= 0.65 * total, f"{total - outcomes['exact']} of {total} networks refused: {outcomes}"


def test_random_networks_are_exact() -> None:
    assert_seldom_refused(conversions(50))


def test_compiled_random_networks_are_exact(tmp_path: Path) -> None:
    simulations(3, tmp_path)


@pytest.mark.slow
def test_many_random_networks_are_exact() -> None:
    assert_seldom_refused(conversions(1500))


@pytest.mark.slow
def test_many_compiled_random_networks_are_exact(tmp_path: Path) -> None:
    simulations(60, tmp_path)
