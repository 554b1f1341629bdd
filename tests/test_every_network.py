"""Whatever is registered in the zoo: builds, has the counts of its card, and every option set said to convert really does, exactly."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import quantlib as ql
import zoo

LARGE, LONG = 10_000_000, 60_000_000  # parameters and MACs from which the plain checks of one network take seconds
NAMES = [pytest.param(n, marks=pytest.mark.slow) if zoo.card(n).parameters > LARGE or zoo.card(n).macs > LONG else n for n in zoo.names()]
CONVERTIBLE = [(name, index) for name in zoo.names() for index in range(len(zoo.card(name).converts))]


def randomised(name: str, options: dict, seed: int = 1) -> nn.Module:
    """Random weights with every constant off its initial value: statistics, negative slopes and negative scales included."""
    generator = torch.Generator().manual_seed(seed)
    model = zoo.get(name, **options).eval()
    state = model.state_dict()
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "running_var" in key:
            state[key] = 0.5 + noise.abs() * 4
        elif value.dim() == 1 and "bn" in key and key.endswith("weight"):
            state[key] = 1 + 0.5 * noise
        else:
            state[key] = value + 0.2 * noise + (noise == 0)
    return zoo.load(model, state)


def shape_of(name: str) -> tuple[int, ...]:
    return zoo.card(name).convert_shape or zoo.card(name).input_shape


def images(name: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, *shape_of(name)), dtype=torch.uint8, generator=generator)


def test_something_is_registered():
    assert zoo.names()


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_output_shape(name):
    card, model = zoo.card(name), zoo.get(name).eval()
    counts = ql.analysis.count(model, card.input_shape)
    assert (counts.parameters, counts.macs) == (card.parameters, card.macs)
    with torch.no_grad():
        assert model(torch.rand(2, *card.input_shape)).shape == (2, *(card.output_shape or (card.classes,)))


@pytest.mark.parametrize("name", zoo.names())
def test_card_is_complete(name):
    card = zoo.card(name)
    assert card.title and card.paper and card.licence and str(card).startswith(card.title)
    assert all(claim.source and claim.unit for claim in (*card.claims, *card.measured))


@pytest.mark.parametrize("name", NAMES)
def test_weights_survive_a_file(name, tmp_path):
    from safetensors.torch import save_file

    model = randomised(name, {})
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")  # shared modules share memory
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth.tar")
    for path in tmp_path.iterdir():
        copy = zoo.load(zoo.get(name), path).eval()
        x = torch.rand(1, *zoo.card(name).input_shape)
        with torch.no_grad():
            assert torch.equal(copy(x), model(x))


@pytest.fixture(scope="module")
def converted():
    """(name, index of the option set) -> (model, graph), made once."""
    made: dict[tuple[str, int], tuple[nn.Module, ql.Graph]] = {}

    def make(name: str, index: int) -> tuple[nn.Module, ql.Graph]:
        if (name, index) not in made:
            model = randomised(name, dict(zoo.card(name).converts[index]))
            made[name, index] = model, ql.convert(model, shape_of(name))
        return made[name, index]

    return make


@pytest.mark.parametrize("name,index", CONVERTIBLE)
def test_every_code_equals_the_model(name, index, converted):
    model, graph = converted(name, index)
    x = images(name, 2)
    check = ql.verify(model, graph, x)
    assert check.ok, str(check)
    assert check.codes > x.numel()
    with torch.no_grad():
        assert ql.run(graph, x).shape == model(x.float() / 255).shape


@pytest.mark.parametrize("name,index", CONVERTIBLE)
def test_compiled_cpp_equals_run(name, index, converted, tmp_path):
    _, graph = converted(name, index)
    x = images(name, 3)
    hls = ql.export(graph, tmp_path / "hls", part="xczu3eg")
    ours, theirs = ql.run(graph, x, integers=True), hls.csim(x, integers=True)
    assert set(ours) == set(theirs)
    for edge in ours:
        assert torch.equal(ours[edge], theirs[edge]), edge
    assert torch.equal(ql.run(graph, x), hls.csim(x))


@pytest.mark.parametrize("name,index", CONVERTIBLE)
def test_a_saved_graph_is_the_same_graph(name, index, converted, tmp_path):
    _, graph = converted(name, index)
    ql.save(graph, tmp_path / "graph")
    x = images(name, 2)
    assert torch.equal(ql.run(ql.load(tmp_path / "graph"), x), ql.run(graph, x))


@pytest.mark.parametrize("name,index", CONVERTIBLE)
def test_a_plan_exists(name, index, converted):
    _, graph = converted(name, index)
    plan = ql.estimate(graph, part="xczu3eg")
    assert plan.cycles > 0 and {row.name for row in plan.rows} == {node.name for node in graph}


@pytest.mark.parametrize("name,option", [(n, o) for n, o in product(zoo.names(), ["fixed_point"]) if o in zoo.card(n).options])
def test_the_float_network_is_refused_with_the_remedy(name, option):
    with pytest.raises(ql.ConversionError, match="FixedPoint|quantlib.layers"):
        ql.convert(zoo.get(name, **{**zoo.card(name).converts[0], option: None}).eval(), shape_of(name))
