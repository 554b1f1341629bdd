"""Every registered layer: documented, exercised, and equal to its integers."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from torch import nn

import quantlib as ql
from quantlib import layers
from quantlib.layers import Layer
from quantlib.lowering import lower

CLASSES = sorted(Layer.registry)
EXAMPLES = [(name, i) for name in CLASSES for i in range(len(Layer.registry[name].examples()))]


def example(name: str, index: int) -> tuple[nn.Module, torch.Tensor]:
    module, x = Layer.registry[name].examples()[index]
    return nn.Sequential(module).eval(), x  # a layer inside a network, as users have it


@pytest.mark.parametrize("stem", sorted(m.name for m in pkgutil.iter_modules(layers.__path__) if not m.name.startswith("_")))
def test_each_file_registers_and_exports_a_layer(stem: str) -> None:
    module = importlib.import_module(f"quantlib.layers.{stem}")
    own = [c for c in Layer.registry.values() if c.__module__ == module.__name__]
    assert own, f"layers/{stem}.py registers no layer"
    for c in own:
        assert getattr(layers, c.__name__, None) is c, f"quantlib.layers does not export {c.__name__}"
        assert c.__name__.lower() == stem.replace("_", ""), "a layer lives in the file of its name"


@pytest.mark.parametrize("name", CLASSES)
def test_docstring_states_the_contract_and_its_example_runs(name: str) -> None:
    c = Layer.registry[name]
    for word in ("Forward:", "Gradient:", "Shapes:", "State:", "Source:", ">>>"):
        assert word in (c.__doc__ or ""), f"{name} does not document {word}"
    namespace = {**vars(layers), **vars(importlib.import_module(c.__module__)), "torch": torch}
    for test in doctest.DocTestFinder(recurse=False).find(c, name, globs=namespace):
        failed, tried = doctest.DocTestRunner().run(test)
        assert tried and not failed


def test_an_undocumented_or_unexampled_layer_cannot_be_imported() -> None:
    with pytest.raises(TypeError, match="docstring.*examples"):
        type("Nameless", (Layer, nn.Module), {})
    assert "Nameless" not in Layer.registry


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_lowered_layer_equals_forward_in_float64(name: str, index: int) -> None:
    module, x = example(name, index)
    assert any(type(m).__name__ == name for m in module.modules())
    graph = ql.convert(module, x.shape[1:])
    codes = ql.run(graph, x, integers=True)
    reference = copy.deepcopy(module).double()
    real = x.double()
    if graph.front is None:  # an image of integer codes: the very numbers that the codes stand for
        t = graph.input.type
        real = (real / torch.tensor(t.scale)).round() * torch.tensor(t.scale)
    with torch.no_grad():
        y = reference(real)
    (decode,) = graph.decodes
    (edge,) = decode.inputs
    n = codes[edge]
    steps = (y.reshape(n.shape).numpy() - decode.bias) / decode.gains[0]
    # float64 sums of the real layer against exact integers: 1e-9 of a step is their rounding noise, far from half a step
    assert np.abs(steps - np.rint(steps)).max() < 1e-9
    assert np.array_equal(np.rint(steps).astype(np.int64), n.numpy())


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_verify_finds_no_difference(name: str, index: int) -> None:
    module, x = example(name, index)
    check = ql.verify(module, ql.convert(module, x.shape[1:]), x)
    assert check.ok, str(check)
    assert check.codes > 0


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_state_dict_copy_and_double(name: str, index: int) -> None:
    module, x = example(name, index)
    again, _ = example(name, index)
    with torch.no_grad():
        for p in again.parameters():
            p.add_(0.25)
        before = list(again.parameters())
        again.load_state_dict(module.state_dict(), strict=True)
        assert [id(p) for p in again.parameters()] == [id(p) for p in before], "an optimizer made before the load would lose its parameters"
        y = module(x)
        assert torch.equal(again(x), y)
        assert torch.equal(copy.deepcopy(module)(x), y)
        assert copy.deepcopy(module).double()(x.double()).dtype is torch.float64
    assert not [k for k, v in module.state_dict().items() if v is None or "zero_point" in k or "bit_width" in k]


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_layout_is_kept(name: str, index: int) -> None:
    module, x = example(name, index)
    if x.dim() != 4:
        pytest.skip("a vector has no layout")
    with torch.no_grad():
        y = module(x.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(y, module(x), rtol=1e-6, atol=1e-6)  # a convolution adds in another order in another layout
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_plain_brevitas_layers_need_no_lower() -> None:
    """A Brevitas layer with its own forward says how it lowers; one without does not shadow the rule of the Brevitas layer. A layer made of
    other layers (FuSeConv2d) is lowered through them."""
    for name in CLASSES:
        c = Layer.registry[name]
        own_forward = any("forward" in vars(k) for k in inspect.getmro(c) if k.__module__.startswith("quantlib."))
        composed = not hasattr(c, "lower") and not any(k.__module__.startswith("brevitas.") for k in inspect.getmro(c))
        assert hasattr(c, "lower") == own_forward or composed, name


def test_lowering_errors_name_the_place() -> None:
    def network(conv: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Sequential(layers.QuantSign(2)), conv)

    for conv, message in (
        (layers.FractionalConv2d(2, 2, 1, real_weights=True), "real_weights = False"),
        (layers.FractionalConv2d(2, 2, 1, dilation=2), "dilation"),
    ):
        with pytest.raises(ql.ConversionError, match=f"^1: .*{message}"):
            lower(network(conv), (2, 3, 3), None)
    zero = layers.FractionalConv2d(2, 2, 1)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ql.ConversionError, match="sign_of_zero"):
        lower(network(zero), (2, 3, 3), None)
    with pytest.raises(ql.ConversionError, match=r"QuantSign\(2\)"):
        lower(nn.Sequential(layers.QuantSign(4), layers.FractionalConv2d(2, 2, 1)), (2, 3, 3), None)


@pytest.mark.parametrize("name", ["BinaryConv2d", "BinaryLinear", "FractionalConv2d", "ScaledIntConv2d", "ScaledIntLinear"])
def test_nan_weights_do_not_convert(name: str) -> None:
    module, x = example(name, 0)
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if n.endswith("weight")).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        ql.convert(module, x.shape[1:])


def test_an_empty_batch_passes() -> None:
    for name, index in EXAMPLES:
        module, x = example(name, index)
        assert module(x[:0]).shape == (0, *module(x).shape[1:])
