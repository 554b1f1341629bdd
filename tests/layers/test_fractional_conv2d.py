"""FractionalConv2d against the published layer's values and gradients, a numpy loop, and its own definition in exact integers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantlib.layers import BinaryConv2d, FractionalConv2d, QuantSign, RPReLU
from quantlib.layers.fractional_conv2d import third_planes

# 72 to 144 float32 products and up to 162 positions are summed in an order that depends on the library: a few units in the last place
ORDER = 1e-6


def close(a: torch.Tensor, b: np.ndarray) -> bool:
    return bool(np.abs(a.detach().numpy() - b).max() <= ORDER * np.abs(b).max())


@pytest.fixture(scope="module")
def golden(shared: Any) -> Any:
    return np.load(shared / "golden/fracbnn_layer_grads.npz", allow_pickle=False)


def build(golden: Any, case: str) -> FractionalConv2d:
    weight, stride, padding = golden[f"{case}/weight"], int(golden[f"{case}/stride"]), int(golden[f"{case}/padding"])
    conv = FractionalConv2d(weight.shape[1], len(weight), weight.shape[2], stride, padding, sparse=bool(golden[f"{case}/sparse_bp"]))
    conv.load_state_dict({k: torch.from_numpy(golden[f"{case}/{k}"]) for k in ("weight", "threshold")}, strict=True)
    return conv


@pytest.mark.parametrize("case", ["pg_s1", "pg_s2", "pg_1x1", "pg_dense", "pg_rawinput"])
def test_golden(golden: Any, case: str) -> None:
    conv = build(golden, case)
    q = torch.from_numpy(golden[f"{case}/input"]).requires_grad_()
    y = conv(q)
    y.backward(torch.from_numpy(golden[f"{case}/grad_out"]))
    assert close(y, golden[f"{case}/output"])
    assert close(q.grad, golden[f"{case}/grad_in"])  # type: ignore[arg-type]
    assert close(conv.weight.grad, golden[f"{case}/grad_weight"])  # type: ignore[arg-type]
    assert close(conv.threshold.grad, golden[f"{case}/grad_threshold"])  # type: ignore[arg-type]
    assert (conv.num_out, int(conv.num_high)) == (int(golden[f"{case}/num_out"][0]), int(golden[f"{case}/num_high"][0]))
    assert (third_planes(q.detach()) is None) == (case == "pg_rawinput")


def test_raw_input_takes_the_published_operations(golden: Any) -> None:
    q, conv = torch.from_numpy(golden["pg_rawinput/input"]), build(golden, "pg_rawinput")
    assert np.array_equal(conv(q).detach().numpy(), golden["pg_rawinput/output"])


def integers(conv: FractionalConv2d, n: np.ndarray) -> np.ndarray:
    """3 y of one image by loops over integers; n holds 3 q."""
    w = np.sign(conv.weight.detach().numpy()).astype(int)
    (ph, pw), (sh, sw), group = conv.padding, conv.stride, n.shape[0] // conv.groups
    padded = np.pad(n, ((0, 0), (ph, ph), (pw, pw)))
    m = np.sign(padded)
    low = padded - 2 * m
    rows, cols = (padded.shape[1] - w.shape[2]) // sh + 1, (padded.shape[2] - w.shape[3]) // sw + 1
    out = np.zeros((len(w), rows, cols), int)
    for o, i, j in itertools.product(range(len(w)), range(rows), range(cols)):
        first = o // (len(w) // conv.groups) * group
        window = np.s_[first : first + group, i * sh : i * sh + w.shape[2], j * sw : j * sw + w.shape[3]]
        high, rest = int((w[o] * m[window]).sum()), int((w[o] * low[window]).sum())
        out[o, i, j] = 2 * high + (rest if 2 * high / 3 > float(conv.threshold.detach()[0, o, 0, 0]) else 0)
    return out


@settings(max_examples=30)
@given(
    st.sampled_from([(1, 1, 1), (2, 3, 1), (4, 4, 2), (3, 3, 3)]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(0, 2**31),
)
def test_integers_by_loops(channels: tuple[int, int, int], kernel: int, stride: int, padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    conv = FractionalConv2d(channels[0], channels[1], kernel, stride, padding, groups=channels[2])
    nn.init.uniform_(conv.threshold, -3, 3)
    n = 2 * torch.randint(0, 4, (1, channels[0], 4, 5)) - 3
    for dtype in (torch.float32, torch.float64):
        y = copy.deepcopy(conv).to(dtype)(n.to(dtype) / 3)
        assert np.array_equal(torch.round(3 * y).detach().numpy()[0].astype(int), integers(conv, n.numpy()[0]))


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_equal_the_restated_formula(sparse: bool) -> None:
    """float64; autograd over the published graph with straight-through pieces stated here."""
    torch.manual_seed(3)
    conv = FractionalConv2d(4, 6, 3, 2, 1, groups=2, sparse=sparse).double()
    nn.init.uniform_(conv.threshold, -3, 3)
    nn.init.normal_(conv.weight)
    for raw in (False, True):
        q0 = torch.randn(3, 4, 7, 5, dtype=torch.float64)
        q0 = 2 * q0 if raw else QuantSign(2).double()(q0)
        q, w, t = (v.detach().clone().requires_grad_() for v in (q0, conv.weight, conv.threshold))

        def straight(v: torch.Tensor) -> torch.Tensor:
            return (torch.sign(v) - v.clamp(-1.3, 1.3)).detach() + v.clamp(-1.3, 1.3)

        msb = nn.functional.conv2d(straight(q), straight(w), None, 2, 1, 1, 2) * 2 / 3
        full = nn.functional.conv2d(q, straight(w), None, 2, 1, 1, 2)
        soft = torch.sigmoid(5 * (msb - t))
        hard = (soft > 0.5).double()
        passes = soft * (soft >= 0.5) if sparse else soft
        mask = (hard - passes).detach() + passes
        y = (1 - mask) * msb + mask * full
        g = torch.randn_like(y)
        y.backward(g)
        conv.zero_grad()
        p = q0.detach().clone().requires_grad_()
        z = conv(p)
        z.backward(g)
        pairs = [(z, y), (p.grad, q.grad), (conv.weight.grad, w.grad), (conv.threshold.grad, t.grad)]
        for a, b in pairs:
            assert a is not None and b is not None and torch.allclose(a, b, rtol=1e-12, atol=1e-12)  # sums in another order


def test_gate_is_measured_at_ties_and_ends() -> None:
    """M = 3 gives msb = 2 exactly: closed at threshold 2 (strict), open just below; far thresholds never or always."""
    conv = FractionalConv2d(1, 6, 3)
    below = float(np.nextafter(np.float32(2), np.float32(0)))
    with torch.no_grad():
        conv.threshold.copy_(torch.tensor([2.0, below, 100.0, -100.0, -1.0, 0.0]).reshape(1, 6, 1, 1))
    assert conv.double().integer_gate().tolist() == [4, 3, 10, -9, -1, 1]


def test_thirds_are_recognised() -> None:
    q = QuantSign(2)(torch.randn(100)).reshape(1, 4, 5, 5)
    planes = third_planes(q)
    assert planes is not None
    m, low = planes
    assert set(m.unique().tolist()) == {-1, 1} == set(low.unique().tolist())
    assert torch.equal(torch.round(3 * q), 2 * m + low)
    for other in (q + 1e-3, 2 * q, torch.full_like(q, float("nan"))):
        assert third_planes(other) is None


def test_real_weights_bypass_the_sign() -> None:
    conv = FractionalConv2d(2, 3, 3, real_weights=True)
    nn.init.constant_(conv.threshold, -1e3)  # every gate open: a plain convolution of q
    q = QuantSign(2)(torch.randn(1, 2, 5, 5))
    expected = nn.functional.conv2d(q, conv.weight)
    assert torch.allclose(conv(q), expected, rtol=0, atol=1e-6)  # (2M + L) / 3 rounds differently from conv(q)
    conv.real_weights = False
    assert torch.equal(torch.round(3 * conv(q)), torch.round(3 * nn.functional.conv2d(q, conv.weight.sign())))
    assert conv.density == 1.0
    assert "real_weights=False" in repr(conv)


def test_autocast_computes_in_float32() -> None:
    conv, x = FractionalConv2d(4, 4, 3), torch.randn(1, 4, 6, 6).bfloat16()
    expected = conv(QuantSign(2)(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(QuantSign(2)(x))
        y.sum().backward()
    assert y.dtype is torch.float32 and torch.equal(y, expected)
    assert conv.weight.grad is not None and conv.weight.grad.dtype is torch.float32


def test_misfit_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="3 groups"):
        FractionalConv2d(4, 6, 3, groups=3)


def test_quantized_tensors_are_accepted() -> None:
    conv, x = FractionalConv2d(2, 2, 1), torch.randn(1, 2, 3, 3)
    assert torch.equal(conv(QuantSign(2, return_quant_tensor=True)(x)), conv(QuantSign(2)(x)))


class Block(nn.Module):
    """FracBNN's CIFAR block, 16 -> 32 channels with stride 2, key by key as published."""

    def __init__(self) -> None:
        super().__init__()
        self.rprelu1, self.rprelu2 = RPReLU(32), RPReLU(32)
        self.conv1, self.conv2 = FractionalConv2d(16, 32, 3, 2, 1), FractionalConv2d(32, 32, 3, 1, 1)
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(32) for _ in range(4))
        self.quant = QuantSign(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.avg_pool2d(x, 2)
        t = self.rprelu1(self.bn1(self.conv1(self.quant(x)))) + torch.cat([pooled, pooled], 1)
        t = self.bn3(t)
        return self.bn4(self.rprelu2(self.bn2(self.conv2(self.quant(t)))) + t)


def test_block_in_training_mode(golden: Any) -> None:
    block = Block()
    names = {n for n, _ in block.named_parameters()}
    block.load_state_dict({n: torch.from_numpy(golden[f"block_train/param/{n}"]) for n in names}, strict=False)
    x = torch.from_numpy(golden["block_train/input"]).requires_grad_()
    y = block(x)
    y.backward(torch.from_numpy(golden["block_train/grad_out"]))
    # batch statistics amplify float32 rounding: four normalisations and two convolutions in a row
    assert np.abs(y.detach().numpy() - golden["block_train/output"]).max() < 5e-6
    assert x.grad is not None
    for a, b in [
        (x.grad, golden["block_train/grad_in"]),
        *((p.grad, golden[f"block_train/grad/{n}"]) for n, p in block.named_parameters()),
    ]:
        assert a is not None and np.abs(a.numpy() - b).max() < 2e-5 * max(1.0, np.abs(b).max())
    for name, buffer in block.named_buffers():
        if not name.startswith("bn"):
            continue
        # float32 means and variances over a batch, summed in an order that depends on the library
        assert np.allclose(buffer.numpy(), golden[f"block_train/buffer_after/{name}"], rtol=1e-6, atol=1e-7), name


def test_binary_conv_golden(golden: Any) -> None:
    conv = BinaryConv2d(6, 10, 3, int(golden["binconv/stride"]), int(golden["binconv/padding"]))
    conv.load_state_dict({"weight": torch.from_numpy(golden["binconv/weight"])}, strict=True)
    assert int((conv.weight == 0).sum()) == 1  # sgn(0) = 0 is part of the golden
    x = torch.from_numpy(golden["binconv/input"]).requires_grad_()
    y = conv(x)
    y.backward(torch.from_numpy(golden["binconv/grad_out"]))
    assert close(y, golden["binconv/output"])
    assert close(x.grad, golden["binconv/grad_in"])  # type: ignore[arg-type]
    assert close(conv.weight.grad, golden["binconv/grad_weight"])
