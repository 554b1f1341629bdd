"""golden/thresholds_small.npz: codes, thresholds and directions of seven conv - batch norm - quantizer chains, found by brute force.

Negative and zero gammas, per-channel input and output scales, all-zero weight channels and exact ties (round half to even) are among
them. Nothing here has a tolerance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantlib as ql
from quantlib import ops
from quantlib.layers import LearnedScaleHardTanh, LearnedScaleReLU, ScaledIntConv2d

CASES = ["conv_relu4", "conv_hardtanh4", "depthwise_relu4", "expand_relu5_perchannel", "first_layer_relu4", "ties_relu4", "ties_hardtanh4"]
Arrays = dict[str, np.ndarray]


class PlainConv(nn.Module):
    """The golden weight codes times their scale, lowered from the codes."""

    def __init__(self, d: Arrays):
        super().__init__()
        self.codes, self.scale = torch.tensor(d["weight_codes"].astype(np.int64)), torch.tensor(d["weight_scale"])
        self.options = {"stride": int(d["stride"]), "padding": int(d["padding"]), "dilation": 1, "groups": int(d["groups"])}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.codes * self.scale.reshape(-1, 1, 1, 1)).to(x.dtype), None, **self.options)

    def lower(self, g, x):  # noqa: ANN001, ANN201
        return g.conv2d(g.integer(x), self.codes.numpy(), self.scale.numpy(), **self.options)


class PlainActivation(nn.Module):
    """clip(round(x / act_scale)) * act_scale with the golden act_scale as it is."""

    def __init__(self, d: Arrays):
        super().__init__()
        self.scale = torch.tensor(d["act_scale"]).reshape(1, -1, 1, 1)
        bits = int(d["act_bits"])
        self.lo, self.hi = (0, 2**bits - 1) if str(d["act"]) == "relu" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(torch.round(x / self.scale), self.lo, self.hi) * self.scale

    def lower(self, g, x):  # noqa: ANN001, ANN201
        return g.quantize(self.forward, x, ql.Grid(self.lo, self.hi, self.scale[0].numpy()))


def batch_norm(d: Arrays) -> nn.Module:
    bn = nn.BatchNorm2d(len(d["bn_gamma"]), eps=float(d["bn_eps"])).double()
    with torch.no_grad():
        for to, key in ((bn.weight, "gamma"), (bn.bias, "beta"), (bn.running_mean, "mean"), (bn.running_var, "var")):
            to.copy_(torch.tensor(d[f"bn_{key}"]))
    return bn


def grid(d: Arrays) -> ql.Grid:
    bits = int(d["in_bits"])
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if d["in_signed"] else (0, 2**bits - 1)
    scale = d["x_scale"]
    return ql.Grid(lo, hi, scale.reshape(-1, 1, 1) if scale.size > 1 else float(scale[0]))


def plain(d: Arrays) -> nn.Module:
    return nn.Sequential(PlainConv(d), batch_norm(d), PlainActivation(d)).eval()


def layered(d: Arrays) -> nn.Module:
    """The same chain of real layers: weights and the log2 of the activation's scale, as a checkpoint holds them."""
    out, per_group, k, _ = d["weight"].shape
    conv = ScaledIntConv2d(
        per_group * int(d["groups"]),
        out,
        k,
        stride=int(d["stride"]),
        padding=int(d["padding"]),
        groups=int(d["groups"]),
        bits=int(d["w_bits"]),
    ).double()
    channels = len(d["act_log2_scale"]) if d["act_log2_scale"].size > 1 else None
    act = (LearnedScaleReLU if str(d["act"]) == "relu" else LearnedScaleHardTanh)(int(d["act_bits"]), channels=channels).double()
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(d["weight"].astype(np.float64)))
        (scale,) = act.parameters()
        scale.copy_(torch.tensor(d["act_log2_scale"]).reshape(scale.shape))
    return nn.Sequential(conv, batch_norm(d), act).eval()


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Arrays]:
    with np.load(shared / "golden" / "thresholds_small.npz") as z:
        cases = {
            case: {k.split("/", 1)[1]: z[k] for k in z.files if k.startswith(f"{case}/")} for case in {k.split("/")[0] for k in z.files}
        }
    assert sorted(cases) == sorted(CASES)
    return cases


def assert_golden(model: nn.Module, d: Arrays) -> None:
    graph = ql.convert(model, d["x_codes"].shape[1:], grid(d))
    conv, threshold = graph.nodes[1:]
    assert isinstance(conv.op, ops.Conv2d) and isinstance(threshold.op, ops.Threshold)
    from quantlib.evaluator import encode, execute

    values = execute(graph, encode(graph, d["x_codes"]), [conv.name, threshold.name])
    assert np.array_equal(values[conv.name].numpy(), d["acc"])
    assert np.array_equal(values[threshold.name].numpy(), d["out_codes"])

    # The golden interval is -R..R for all channels, ours is tighter: thresholds outside ours are never, or always, reached.
    t, sign, op = conv.type, d["sign"].astype(np.int64), threshold.op
    assert -int(d["acc_bound"]) <= t.lo and t.hi <= int(d["acc_bound"])
    channels = len(sign)
    ours = np.broadcast_to(op.thresholds, d["thresholds"].shape)
    direction = np.broadcast_to(op.sign, (channels,))
    n = np.arange(t.lo, t.hi + 1)
    want = (sign[:, None, None] * n[:, None] >= d["thresholds"][:, None, :]).sum(2)
    assert np.array_equal((direction[:, None, None] * n[:, None] >= ours[:, None, :]).sum(2), want), (
        "another code for some integer of the interval"
    )
    alive = (want != want[:, :1]).any(1)  # a zero gamma or all-zero weights: one code for every integer, in either direction
    assert np.array_equal(direction[alive], sign[alive])
    low, high = np.where(sign > 0, t.lo, -t.hi)[:, None], np.where(sign > 0, t.hi, -t.lo)[:, None]
    assert np.array_equal(np.clip(ours, low, high + 1)[alive], np.clip(d["thresholds"], low, high + 1)[alive])
    assert op.thresholds.min() >= low.min() and op.thresholds.max() <= high.max() + 1, "thresholds of dead channels lie beside the interval"

    check = ql.verify(model, graph, d["x_codes"])
    assert check.ok, str(check)


@pytest.mark.parametrize("case", CASES)
def test_plain_chain(golden: dict[str, Arrays], case: str) -> None:
    assert_golden(plain(golden[case]), golden[case])


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("ties")])
def test_chain_of_layers(golden: dict[str, Arrays], case: str) -> None:
    model = layered(golden[case])
    quantized = model[0].quant_weight()
    assert np.array_equal((quantized.value / quantized.scale).round().detach().numpy(), golden[case]["weight_codes"])
    assert_golden(model, golden[case])


def test_the_cases_hold_what_they_are_for(golden: dict[str, Arrays]) -> None:
    assert any((d["bn_gamma"] < 0).any() for d in golden.values()) and any((d["bn_gamma"] == 0).any() for d in golden.values())
    assert golden["depthwise_relu4"]["x_scale"].size > 1 and golden["expand_relu5_perchannel"]["act_scale"].size > 1


@pytest.mark.parametrize("case", ["ties_relu4", "ties_hardtanh4"])
def test_ties_are_real_and_counted(golden: dict[str, Arrays], case: str) -> None:
    """The dyadic cases fall exactly between two codes: rounding half up gives other codes than half to even; verify counts the ties."""
    d = golden[case]
    model = plain(d)
    x = torch.tensor(d["x_codes"].astype(np.float64) * float(d["x_scale"][0]))
    units = model[:2](x) / float(d["act_scale"][0])
    ties = (units - units.floor() == 0.5).sum()
    assert ties > 0
    half_up = torch.clamp(torch.floor(units + 0.5), model[2].lo, model[2].hi).detach().numpy()
    assert (half_up != d["out_codes"]).any()
    check = ql.verify(model, ql.convert(model, d["x_codes"].shape[1:], grid(d)), d["x_codes"])
    assert sum(r.ties for r in check.rows) > 0
