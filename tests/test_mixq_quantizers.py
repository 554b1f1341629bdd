"""Constant-step, image and DoReFa quantizers and their mixtures against recorded runs of the published code."""

import doctest
import importlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantlib.quantizers.constant_steps import HALF_WAVE_STEPS, WEIGHT_STEPS, constant_step, half_wave, image_floor, weight_step
from quantlib.quantizers.dorefa import dorefa_activation, dorefa_weight
from quantlib.quantizers.mixtures import CANDIDATES, mixed_constant_step, mixed_half_wave, mixed_image_floor

TENSORS = ("conv3", "conv1", "dw5", "linear")


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden/mixq_quantizers.npz") as file:
        return dict(file)


def near(ours: Tensor, recorded: np.ndarray, tolerance: float) -> None:
    """The tolerances are those at which the recordings are stated: they were made by another build of torch."""
    assert ours.shape == recorded.shape
    assert np.abs(ours.detach().numpy() - recorded).max() <= tolerance * max(1.0, np.abs(recorded).max())


def gradients(run, inputs: list[Tensor], grad: np.ndarray) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    run(*leaves).backward(torch.from_numpy(grad))
    return tuple(x.grad for x in leaves)


def test_the_tables_of_steps(golden):
    assert list(WEIGHT_STEPS.values()) == golden["gaussian_steps"].tolist()
    assert list(HALF_WAVE_STEPS.values()) == golden["hwgq_steps"].tolist()


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_constant_step_weights(golden, tensor, bits):
    w = torch.from_numpy(golden[f"w.{tensor}.input"])
    prefix = f"w.{tensor}.b{bits}"
    value, step = constant_step(w, bits)
    assert float(weight_step(w, bits)) == pytest.approx(float(golden[f"{prefix}.step"]), rel=1e-6)  # float32 std of another build of torch
    assert np.array_equal((value / step).round().numpy(), golden[f"{prefix}.int"])
    near(value, golden[f"{prefix}.output"], 1e-6)
    if bits > 1:
        near(constant_step(w, bits, mid_rise=True)[0], golden[f"{prefix}.sym_output"], 1e-6)
    grad = golden[f"w.{tensor}.grad_out"]
    (dw,) = gradients(lambda v: constant_step(v, bits)[0], [w], grad)
    assert np.array_equal(dw.numpy(), grad)


@pytest.mark.parametrize("bits", [*range(1, 9), 32])
def test_half_wave_activations(golden, bits):
    prefix = f"a.hwgq.b{bits}"
    x = torch.from_numpy(golden[f"{prefix}.input"])
    y = half_wave(x, bits)
    near(y, golden[f"{prefix}.output"], 1e-6)
    if bits < 32:
        h = np.float64(HALF_WAVE_STEPS[bits])
        assert np.array_equal(np.rint(y.numpy() / h), np.rint(golden[f"{prefix}.output"] / h))
    (dx,) = gradients(lambda v: half_wave(v, bits), [x], golden[f"{prefix}.grad_out"])
    assert np.array_equal(dx.numpy(), golden[f"{prefix}.grad_in"])


@pytest.mark.parametrize("bits", range(2, 9))
def test_image_quantizer(golden, bits):
    prefix = f"a.image.b{bits}"
    x = torch.from_numpy(golden[f"{prefix}.input"])
    assert np.array_equal(image_floor(x, bits).numpy(), golden[f"{prefix}.output"])
    assert not golden[f"{prefix}.grad_in"].any() and not image_floor(x.requires_grad_(), bits).requires_grad


@pytest.mark.parametrize("bits", [*range(1, 9), 32])
def test_dorefa(golden, bits):
    for kind, run in (("w", dorefa_weight), ("a", dorefa_activation)):
        prefix = f"dorefa.{kind}.b{bits}"
        if f"{prefix}.input" not in golden:
            continue
        x = torch.from_numpy(golden[f"{prefix}.input"])
        near(run(x, bits), golden[f"{prefix}.output"], 1e-6)
        (dx,) = gradients(lambda v, run=run: run(v, bits), [x], golden[f"{prefix}.grad_out"])
        near(dx, golden[f"{prefix}.grad_in"], 1e-5)


@pytest.mark.parametrize("kind,run", [("hwgq", mixed_half_wave), ("image", mixed_image_floor)])
def test_mixed_activations(golden, kind, run):
    alpha, x = (torch.from_numpy(golden[f"mixa.{kind}.{k}"]) for k in ("alpha", "input"))
    mixed = lambda v, a: run(v, torch.softmax(a, 0))  # noqa: E731
    near(mixed(x, alpha), golden[f"mixa.{kind}.output"], 1e-6)
    dx, dalpha = gradients(mixed, [x, alpha], golden[f"mixa.{kind}.grad_out"])
    near(dx, golden[f"mixa.{kind}.grad_in"], 1e-5)
    near(dalpha, golden[f"mixa.{kind}.grad_alpha"], 1e-5)


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_composite_convolution(golden, kind):
    alpha, w, x = (torch.from_numpy(golden[f"mixw.{kind}.{k}"]) for k in ("alpha", "weight", "input"))

    def run(v: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(v, mixed_constant_step(weight, torch.softmax(a, 0), separate=kind == "separate"), padding=1)

    near(run(x, alpha, w), golden[f"mixw.{kind}.output"], 1e-6)
    for ours, name in zip(gradients(run, [x, alpha, w], golden[f"mixw.{kind}.grad_out"]), ("in", "alpha", "weight"), strict=True):
        near(ours, golden[f"mixw.{kind}.grad_{name}"], 1e-5)


def test_a_mixture_is_the_sum_of_its_quantizers():
    """Against the single quantizers and autograd, in float64, where both round alike."""
    torch.manual_seed(1)
    x, shares, grad = torch.randn(2, 3, 4, 5).double(), torch.rand(7).double(), torch.randn(2, 3, 4, 5).double()
    cases = (
        (mixed_half_wave, lambda v, b: half_wave(v, b)),
        (mixed_constant_step, lambda v, b: constant_step(v, b)[0]),
        (mixed_image_floor, lambda v, b: image_floor(v, b) + 0 * v),
    )
    for fused, single in cases:
        plain = lambda v, s, single=single: sum(s[i] * single(v, b) for i, b in enumerate(CANDIDATES))  # noqa: E731
        ours, theirs = (gradients(f, [x, shares], grad.numpy()) for f in (fused, plain))
        for a, b in zip((fused(x, shares), *ours), (plain(x, shares), *theirs), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)  # sums in another order


def test_pieces_of_a_large_map_in_either_layout(monkeypatch):
    """Cut into pieces, gradients of another layout and maps with gaps included, against the whole."""
    torch.manual_seed(2)
    wide, shares, grad = torch.randn(2, 3, 5, 14), torch.rand(7), torch.randn(2, 3, 5, 7)
    gaps, last = wide[..., ::2], wide[..., ::2].contiguous(memory_format=torch.channels_last)
    grads = (grad, grad.contiguous(memory_format=torch.channels_last), grad[..., :1].expand_as(grad))
    for g in grads:
        whole = gradients(mixed_half_wave, [gaps.contiguous(), shares], g.numpy())
        monkeypatch.setattr("quantlib.quantizers.mixtures.PIECE", 11)
        for x in (gaps, last):
            leaf, weight = x.clone(memory_format=torch.preserve_format).requires_grad_(), shares.clone().requires_grad_()
            y = mixed_half_wave(leaf, weight)
            y.backward(g)
            assert torch.equal(leaf.grad, whole[0]) and torch.equal(y, mixed_half_wave(gaps.contiguous(), shares))
            assert torch.allclose(weight.grad, whole[1], rtol=1e-5)  # sums in another order
        monkeypatch.undo()


def test_layout_and_dtype_are_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for y in (half_wave(x, 4), mixed_half_wave(x, torch.rand(7)), dorefa_activation(x, 4), image_floor(x, 4)):
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.float32
    assert half_wave(x.double(), 4).dtype == torch.float64


def test_equal_weights_and_wrong_widths():
    assert torch.equal(constant_step(torch.zeros(3, 2), 4)[0], torch.zeros(3, 2))
    for run, message in (
        (lambda: constant_step(torch.ones(1), 4), "at least two"),
        (lambda: constant_step(torch.ones(4), 9), "1 to 8 bits"),
        (lambda: half_wave(torch.ones(4), 0), "1 to 8 bits"),
        (lambda: image_floor(torch.ones(4), 12), "1 to 8 bits"),
        (lambda: dorefa_weight(torch.ones(4), 9), "1 to 8 bits"),
        (lambda: mixed_half_wave(torch.ones(4), torch.ones(3)), "one share for each"),
        (lambda: mixed_constant_step(torch.ones(4, 2), torch.ones(7), separate=True), "one tensor for each"),
    ):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("module", ["constant_steps", "mixtures", "dorefa"])
def test_examples_in_the_docstrings(module):
    found = importlib.import_module(f"quantlib.quantizers.{module}")
    names = {"torch": torch, "constant_step": constant_step}
    failed, tried = 0, 0
    for test in doctest.DocTestFinder().find(found, extraglobs=names):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        failed, tried = failed + result.failed, tried + result.attempted
    assert tried >= 2 and not failed
