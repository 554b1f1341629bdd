"""The compiled kernels against the tensor operations beside them: equal values in every bit, equal gradients, in every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from brevitas.quant_tensor import QuantTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantlib.layers import FractionalConv2d, Layer, LearnedScaleReLU, QuantSign, RPReLU, ScaledIntConv2d
from quantlib.quantizers import divided_clip, kernels, learned_log2_scale, learned_scale, max_abs

DTYPES = [torch.float32, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if not kernels.fit(torch.zeros(1)):
        pytest.skip("no kernels on this machine: no g++, or QUANTLIB_ENGINE=torch")


def both_ways(function: Callable[..., Any], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, then gradients of all inputs, by the kernels and by the tensor operations. The first output's gradient is a fixed wave."""

    def once() -> list[Tensor]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        wave = torch.cos(torch.arange(outputs[0].numel(), dtype=outputs[0].dtype)).reshape(outputs[0].shape)
        total = (outputs[0].nan_to_num(0, 0, 0) * wave).sum() + sum(o.sum() for o in outputs[1:])
        return [o.detach() for o in outputs] + list(torch.autograd.grad(total, leaves))

    fast = once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fit", lambda *_: False)
        slow = once()
    return fast, slow


def assert_same(fast: Sequence[Tensor], slow: Sequence[Tensor], exact: int) -> None:
    """The first `exact` tensors bit by bit, the output with its layout; the others are sums of the same terms in another order."""
    for k, (a, b) in enumerate(zip(fast, slow, strict=True)):
        if k < exact:
            assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) and (k or a.stride() == b.stride())
        else:
            tight = 1e-12 if a.dtype is torch.float64 else 2e-4  # float32: the tensor operations subtract two large sums
            assert torch.allclose(a, b, rtol=tight, atol=tight * max(1.0, float(b.abs().max())))


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, step: float, layout: torch.memory_format) -> Tensor:
    """Normal numbers, exact halves of a step, and the numbers that are like no other."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(shape, generator=generator, dtype=dtype)
    half_steps = torch.randint(-20, 20, shape, generator=generator).to(dtype) * step / 2
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, half_steps, x)
    special = torch.tensor([float("nan"), 0.0, -0.0, 1e30], dtype=dtype)
    x.view(-1)[:4] = special[: x.numel()]
    return x.contiguous(memory_format=layout)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 6), st.integers(1, 7))


@settings(max_examples=60)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans(), st.booleans(), st.integers(1, 8), st.integers(0, 2**31))
def test_learned_scale(shape: Any, dtype: Any, layout: Any, per_channel: bool, signed: bool, bits: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    lo, hi = (-half, half - 1) if signed and bits > 1 else (0, 2 * half - 1)
    log2 = torch.linspace(-2, 3, shape[1], dtype=dtype).reshape(1, -1, 1, 1) if per_channel else torch.tensor(1.0, dtype=dtype)
    top = torch.tensor(float(-lo or hi), dtype=dtype)
    x = values(shape, dtype, seed, float((2.0**log2 / top).max()), layout)
    for gradient in ("2019", "brevitas"):
        for relu in (False, lo == 0):
            fast, slow = both_ways(lambda x, v, g=gradient, r=relu: learned_log2_scale(x, v, top, lo, hi, g, r), x, log2)
            x_is_finite = torch.isfinite(fast[0])
            assert_same([*fast[:2], fast[2] * x_is_finite], [*slow[:2], slow[2] * x_is_finite], 3)
            clean = x.nan_to_num(0.0).clamp(-100, 100)
            fast, slow = both_ways(lambda x, v, g=gradient, r=relu: learned_log2_scale(x, v, top, lo, hi, g, r), clean, log2)
            assert_same(fast, slow, 3)
            scale = (2.0**log2 / top).to(dtype)
            fast, slow = both_ways(lambda x, s, g=gradient, r=relu: learned_scale(x, s, lo, hi, g, r), clean, scale)
            assert_same(fast, slow, 2)


def test_a_folded_relu_is_relu_then_quantizer() -> None:
    """At 0, half a step below it, and above: gradient and value of the composition, ties included."""
    x = torch.tensor([-9.0, -0.25, -0.0, 0.0, 1e-300, 0.25, 0.75, 7.75, 8.0, 99.0], dtype=torch.float64)
    for gradient in ("2019", "brevitas"):
        results = []
        for relu in (True, False):
            leaf, s = x.clone().requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            y = learned_scale(leaf if relu else torch.relu(leaf), s, 0, 15, gradient, relu)  # type: ignore[arg-type]
            y.backward(torch.arange(1.0, 11, dtype=torch.float64))
            results.append((y.detach(), leaf.grad, s.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


@settings(max_examples=40)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.sampled_from([None, 0]), st.integers(2, 8), st.integers(0, 2**31))
def test_max_abs(shape: Any, dtype: Any, layout: Any, channel: Any, bits: int, seed: int) -> None:
    """Ties of the maximum (in every order of memory the first in logical order), dead channels."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-3, 4, shape, generator=generator).to(dtype) / 4
    w = torch.where(torch.rand(shape, generator=generator) < 0.5, w, w * torch.rand(shape, generator=generator, dtype=dtype))
    w[0] = 0
    fast, slow = both_ways(lambda t: max_abs(t, bits, channel), w.contiguous(memory_format=layout))
    assert_same(fast, slow, 2)
    # a gradient that is exactly 0 one way and not the other differs by the rounding of two large sums
    through = fast[2] - slow[2]
    assert torch.equal(fast[2] == 0, slow[2] == 0) or float(through.abs().max()) < 1e-5


def test_max_abs_shows_nan() -> None:
    w = torch.randn(3, 4, 2, 2)
    w[1, 2, 0, 1] = float("nan")
    value, scale = max_abs(w, 4)
    assert scale.isnan().flatten().tolist() == [False, True, False] and bool(value[1].isnan().all()) and not bool(value[0].isnan().any())


@settings(max_examples=30)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.integers(0, 2**31))
def test_rprelu(shape: Any, dtype: Any, layout: Any, seed: int) -> None:
    torch.manual_seed(seed)
    module = RPReLU(shape[1]).to(dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    parameters = [module.shift_x.bias, module.prelu.weight, module.shift_y.bias]

    def run(x: Tensor, *new: Tensor) -> Tensor:
        named = dict(zip(("shift_x.bias", "prelu.weight", "shift_y.bias"), new, strict=True))
        return torch.func.functional_call(module, named, (x,))  # type: ignore[no-any-return]

    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
    fast, slow = both_ways(run, x, *(p.detach() for p in parameters))
    assert_same(fast, slow, 2)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_convolution(dtype: torch.dtype, layout: torch.memory_format, sparse: bool) -> None:
    torch.manual_seed(4)
    conv = FractionalConv2d(6, 10, 3, padding=1, sparse=sparse).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    torch.nn.init.uniform_(conv.threshold, -4, 4)
    counts = []

    def run(q: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
        y = torch.func.functional_call(conv, {"weight": weight, "threshold": threshold}, (q,))
        counts.append(int(conv.num_high))
        return y  # type: ignore[no-any-return]

    q = QuantSign(2)(torch.randn(2, 6, 7, 5, dtype=dtype)).contiguous(memory_format=layout)
    fast, slow = both_ways(run, q, conv.weight.detach(), conv.threshold.detach())
    assert torch.equal(fast[0], slow[0]) and fast[0].stride() == slow[0].stride() and counts[0] == counts[1] > 0
    for a, b in zip(fast[1:], slow[1:], strict=True):
        # gradients of convolutions whose operands are rounded once or twice
        assert torch.allclose(a, b, rtol=1e-12 if dtype is torch.float64 else 1e-5, atol=1e-12 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 4, 8, 32])
def test_divided_clip(dtype: torch.dtype, layout: torch.memory_format, bits: int) -> None:
    x = values((2, 5, 4, 3), dtype, 3, 1.5 / 15, layout).nan_to_num(1.5)
    x.reshape(-1)[5] = 1.5
    for clip in (1.5, -1.5):
        fast, slow = both_ways(lambda t, c: divided_clip(t, c, bits, 2.0), x.clamp(-50, 50), torch.tensor([clip], dtype=dtype))
        assert_same(fast, slow, 2)


def test_threads_share_large_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values do not depend on the number of threads, sums only by their order, and both repeat bit by bit."""
    x, s = 4 * torch.randn(4, 24, 64, 64), torch.rand(1, 24, 1, 1) + 0.1
    results = []
    for threads in (1, 3, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        a, b = x.clone().requires_grad_(), s.clone().requires_grad_()
        y = learned_scale(a, b, 0, 15)
        y.backward(x)
        results.append((y.detach(), a.grad, b.grad))
    assert all(torch.equal(p, q) for p, q in zip(results[1], results[2], strict=True))  # type: ignore[arg-type]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-6, atol=0)  # type: ignore[arg-type]  # blocks begin elsewhere


def test_they_step_aside_where_calls_are_recorded() -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2, 3)
    with Watching():
        assert not kernels.fit(x)
    assert not kernels.fit(x.half()) and not kernels.fit(x, x.double()) and not kernels.fit(x.to("meta")) and kernels.fit(x)
    assert kernels.places(x[:, 1:], 1) is None and kernels.places(torch.zeros(2, 3, 4, 5).permute(3, 0, 1, 2), 1) is None
    assert kernels.places(torch.zeros(2, 3, 4, 5), 3) == (2, 3, 20)
    assert kernels.places(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 3) == (40, 3, 1)


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLIB_ENGINE", "torch")
    kernels._library.cache_clear()
    try:
        assert not kernels.fit(torch.zeros(1))
        assert LearnedScaleReLU(2, init=3.0)(torch.tensor([-1.0, 1.4])).tolist() == [0.0, 1.0]
    finally:
        monkeypatch.undo()
        kernels._library.cache_clear()


def test_the_shorter_way_while_training_changes_nothing() -> None:
    """In training mode a convolution asks its quantizer directly; hooks, and whoever wants quantized tensors, get Brevitas' way."""
    conv, x = ScaledIntConv2d(3, 4, 3, bits=4, bias=True), torch.randn(2, 3, 6, 6)
    assert torch.equal(conv.train()(x), conv.eval()(x))
    seen = []
    handle = conv.weight_quant.register_forward_hook(lambda m, i, o: seen.append(o.scale.shape))
    assert torch.equal(conv.train()(x), conv.eval()(x)) and seen == [(4, 1, 1, 1)] * 2
    handle.remove()
    conv.train().weight_quant.disable_quant = True
    assert torch.equal(conv(x), torch.nn.functional.conv2d(x, conv.weight, conv.bias))
    act = LearnedScaleReLU(4, return_quant_tensor=True).train()
    assert conv(act(x)).shape == (2, 4, 4, 4)


LAYERS = [(name, i) for name in sorted(Layer.registry) for i in range(len(Layer.registry[name].examples()))]


@pytest.mark.filterwarnings("ignore:No quant bias cache")
@pytest.mark.parametrize(("name", "index"), LAYERS)
def test_every_layer_trains_alike_in_both_layouts_and_both_ways(name: str, index: int) -> None:
    """One step in float64: NCHW by the kernels, channels last by the kernels, NCHW by the tensor operations."""
    results = []
    for layout, fit in ((LAYOUTS[0], kernels.fit), (LAYOUTS[1], kernels.fit), (LAYOUTS[0], lambda *_: False)):
        module, x = Layer.registry[name].examples()[index]
        layout = layout if x.dim() == 4 else LAYOUTS[0]
        module = module.double().train().to(memory_format=layout)  # type: ignore[call-overload]
        x = x.double().contiguous(memory_format=layout).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "fit", fit)
            y = module(x)
            y = y.value if isinstance(y, QuantTensor) else y
            gradients = [g for g in (x, *module.parameters()) if g.requires_grad]
            made = torch.autograd.grad(y.square().sum(), gradients, allow_unused=True) if y.requires_grad else ()
        assert y.dim() != 4 or y.is_contiguous(memory_format=layout)
        results.append([y.detach(), *(g for g in made if g is not None)])
    first, *others = results
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-11 * max(1.0, float(a.abs().max())))  # sums in another order
