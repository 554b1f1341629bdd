"""The supernet: equal to the published one, exact at both ends, made from any quantized model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from search import nets
from torch import nn

import quantlib as ql
import zoo
from quantlib.layers import BinaryConv2d, FixedPoint, LearnedScaleReLU, ScaledIntConv2d, ScaledIntLinear, TruncAvgPool
from quantlib.quantizers import learned_scale
from quantlib.search import MixedActivation, MixedWeights, SearchError, fixed, layers, make_bits, read_bits, split_parameters, supernet
from quantlib.search.learned import mixed_learned_scale

PUBLISHED = {"vggtiny": "vggtiny_cifar10", "ultranet": "ultranet_dacsdc", "skynetk5": "skynetk5_dacsdc"}


def build(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = nets.KINDS[kind]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias, 0, 0.3)
    return supernet(model, input_shape=nets.SHAPE, **({"bits": (2, 4, 7)} | options)).eval()


def draw(net: nn.Module, seed: int, sharp: bool = False) -> nn.Module:
    """Random alphas; sharp: so far apart that every share is exactly 0 or 1 in float64."""
    rng = np.random.default_rng(seed)
    for alpha in split_parameters(net)[1]:
        values = rng.permutation(len(alpha)) * 1e4 if sharp else rng.normal(size=len(alpha))
        alpha.data.copy_(torch.from_numpy(values))
    return net


def images(n: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (n, *nets.SHAPE)) / 256


# The published supernet.


@pytest.mark.parametrize("short", PUBLISHED)
def test_published_supernets(short: str, shared: Path) -> None:
    z = np.load(shared / "golden" / f"mixq_supernet_{short}.npz")
    fix = ("linear",) if short == "vggtiny" else ()
    net = supernet(zoo.get(PUBLISHED[short]), input_shape=z["input"].shape[1:] if short != "vggtiny" else (3, 32, 32), fixed=fix)
    state = {k[3:]: z[k].astype(np.float32) if z[k].dtype == np.float16 else z[k] for k in z.files if k.startswith("sd.")}
    zoo.load(net, state)
    net.eval()
    out = net(torch.from_numpy(z["input_u8"].astype(np.float32)) / 256)
    if out.dim() == 4:  # raw head, as the published training output lays it out
        n, _, h, w = out.shape
        out = out.reshape(n, 6, 6, h, w).permute(0, 1, 3, 4, 2)
    assert np.abs(out.detach().numpy() - z["output"]).max() <= 1e-4  # float32 sums in another order
    out.backward(torch.from_numpy(z["grad_out"]))
    theirs = {
        kind: sorted((k for k in z.files if k.startswith("grad.") and k.endswith(kind)), key=positions) for kind in ("activ", "weight")
    }
    largest = max(float(np.abs(z[k]).max()) for kind in theirs.values() for k in kind)
    for layer, act, weight in zip(layers(net), theirs["activ"], theirs["weight"], strict=True):
        (source,) = layer.inputs
        assert isinstance(source, MixedActivation) and source.alpha_activ.grad is not None and layer.alpha_weight.grad is not None
        for mine, key in ((source.alpha_activ.grad, act), (layer.alpha_weight.grad, weight)):
            assert np.abs(mine.numpy() - z[key]).max() <= 1e-4 * largest  # the reference's own tolerance for float32


@pytest.mark.parametrize("share", [True, False])
def test_the_published_key_layout_of_both_forms(share: bool) -> None:
    """Positions of UltraNet's layers in the published state dict: convolutions, each with its norm behind it but the last."""
    places = [0, 3, 6, 9, 12, 14, 16, 18, 20]
    net = draw(supernet(zoo.get("ultranet_dacsdc"), input_shape=(3, 32, 64), share=share), 3)
    own = net.state_dict()
    theirs: dict[str, torch.Tensor] = {}
    for i, p in enumerate(places):
        theirs[f"layers.{p}.mix_activ.alpha_activ"] = own[f"layers.act{i}.alpha_activ"]
        theirs[f"layers.{p}.mix_weight.alpha_weight"] = own[f"layers.conv{i}.alpha_weight"]
        for key in own:
            head, _, leaf = key.rpartition(".")
            if head.startswith(f"layers.conv{i}.branches."):
                j = head.rpartition(".")[2]
                theirs[f"layers.{p}.mix_weight.{'conv' if share else f'conv_list.{j}'}.{leaf}"] = own[key]
            elif head == f"layers.bn{i}":
                theirs[f"layers.{p + 1}.{leaf}"] = own[key]
        theirs |= {f"layers.{p}.{size}": torch.tensor(1.0) for size in ("size_product", "memory_size", "in_width")}
    assert len(theirs) == len(own) + 27
    again = zoo.load(draw(supernet(zoo.get("ultranet_dacsdc"), input_shape=(3, 32, 64), share=share), 4), theirs)
    assert all(torch.equal(own[key], value) for key, value in again.state_dict().items())


def positions(key: str) -> list[int]:
    return [int(part) for part in key.split(".") if part.isdigit()]


# Composites are what they say.


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", nets.KINDS)
def test_with_all_shares_on_one_width_it_is_the_fixed_model(kind: str, share: bool) -> None:
    net = draw(build(kind, share=share), 5, sharp=True).double()
    x = images().double()
    plain = fixed(net)
    assert torch.equal(net(x), plain(x))
    assert {type(m) for m in plain.modules()} == {type(m) for m in nets.KINDS[kind]().modules()}
    assert plain.state_dict().keys() == nets.KINDS[kind]().state_dict().keys()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", nets.KINDS)
def test_composites_are_weighted_sums_of_the_candidates(kind: str, share: bool) -> None:
    net = draw(build(kind, share=share), 1).double()
    for mixed in layers(net):
        p = torch.softmax(mixed.alpha_weight, 0)
        expect: Any = 0
        for i, width in enumerate((2, 4, 7)):
            sharp = copy.deepcopy(mixed)
            sharp.alpha_weight.data.copy_(torch.eye(3)[i] * 1e5)
            value = sharp.weight()
            assert all(len(row.unique()) <= 2**width for row in value.detach())
            expect = expect + p[i] * value
        # the sum runs in another order than the fused one
        assert torch.allclose(mixed.weight(), expect, rtol=1e-12, atol=1e-14)
    x = torch.randn(2, 6, 5, 5).double() * 2
    for act in [m for m in net.modules() if isinstance(m, MixedActivation)]:
        p = torch.softmax(act.alpha_activ, 0)
        y = x[:, :3] if act is next(m for m in net.modules() if isinstance(m, MixedActivation)) else x
        values = [getattr(v, "value", v) for v in (c(y) for c in act.candidates)]
        assert torch.allclose(act(y), sum(s * v for s, v in zip(p, values)), rtol=1e-12, atol=1e-14)  # likewise


@given(st.integers(0, 10_000), st.sampled_from(["2019", "brevitas"]), st.booleans(), st.booleans())
def test_fused_learned_scales_have_the_gradients_of_their_parts(seed: int, gradient: Any, signed: bool, per_channel: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)).requires_grad_()
    shares = torch.rand(4, generator=g, dtype=torch.float64).requires_grad_()
    shape = (1, 3, 1, 1) if per_channel else ()
    ranges = [(-(2 ** (b - 1)), 2 ** (b - 1) - 1) if signed else (0, 2**b - 1) for b in (1, 2, 5, 8)]
    scales = [(torch.rand(shape, generator=g, dtype=torch.float64) + 0.02).requires_grad_() for _ in ranges]
    dy = torch.randn(x.shape, generator=g, dtype=torch.float64)
    inputs = [x, shares, *scales]
    fused = mixed_learned_scale(x, shares, scales, ranges, gradient)
    plain = sum(p * learned_scale(x, s, lo, hi, gradient) for p, s, (lo, hi) in zip(shares, scales, ranges))
    assert isinstance(plain, torch.Tensor)
    assert torch.allclose(fused, plain, rtol=1e-12, atol=1e-12)  # the parts are added in another order
    for ours, theirs in zip(torch.autograd.grad(fused, inputs, dy), torch.autograd.grad(plain, inputs, dy)):
        # sums over the whole tensor in another order, whose terms cancel
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", nets.KINDS)
def test_one_convolution_per_layer_and_every_parameter_learns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(kind).train()
    calls = []
    for mixed in layers(net):
        one = type(mixed.layer).inner_forward_impl
        monkeypatch.setattr(mixed.layer, "inner_forward_impl", lambda *a, m=mixed, f=one: (calls.append(m.name), f(m.layer, *a))[1])
    out = net(images(4))
    assert calls == [m.name for m in layers(net)]
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    alphas = split_parameters(net)[1]
    assert len(alphas) == 6 and all(bool((a.grad != 0).any()) for a in alphas if a.grad is not None)


# Found bits, and the way back.


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", nets.KINDS)
def test_what_is_found_converts_and_is_exact(kind: str, share: bool) -> None:
    net = draw(build(kind, share=share), 7)
    net.train()(images(8))
    plain = fixed(net.eval())
    sample = None if kind == "constant" else ql.Grid(0, 255, 1 / 256)
    graph = ql.convert(plain, nets.SHAPE, input=sample)
    assert ql.verify(plain, graph, (images(4) * 256).to(torch.uint8)).ok


def test_bits_are_those_of_the_largest_share_and_reach_the_layers() -> None:
    net = build("scaled", weight_bits=(3, 5, 2), act_bits=(4, 6))
    first = read_bits(net)
    assert (first.bitw, first.bita) == ("333", "444")  # equal shares: the first candidate
    a, b, c = layers(net)
    b.alpha_weight.data[2], c.alpha_weight.data[1] = 1.0, 1.0
    net.get_submodule("3").alpha_activ.data[1] = 1.0  # type: ignore[operator, union-attr, index]
    found = read_bits(net)
    assert (found.weight_bits, found.act_bits, found.names) == ((3, 2, 5), (4, 6, 4), ("1", "4", "9"))
    assert found.activations == {"0": 4, "3": 6, "6": 4}
    plain = fixed(net)
    assert [int(plain[i].weight_quant.bit_width()) for i in (1, 4, 9)] == [3, 2, 5]  # type: ignore[index, operator]
    assert [plain[i].bits for i in (0, 3, 6)] == [4, 6, 4]  # type: ignore[index]
    assert make_bits(net, "325", [4, 6, 4]) == found
    other = fixed(net, make_bits(net, [5, 5, 5], "666"))
    assert [int(other[i].weight_quant.bit_width()) for i in (1, 4, 9)] == [5, 5, 5]  # type: ignore[index, operator]


def test_the_fixed_model_is_the_zoo_s_network_with_these_bits() -> None:
    net = draw(supernet(zoo.get("vggtiny_cifar10"), input_shape=(3, 32, 32), fixed="linear"), 2).eval()
    found, plain = read_bits(net), fixed(net)
    network = zoo.get("vggtiny_cifar10", weight_bits=found.bitw, act_bits=found.bita).eval()
    network.load_state_dict(plain.state_dict())
    x = torch.randint(0, 256, (2, 3, 32, 32)) / 256
    assert torch.equal(network(x), plain(x))


def test_the_model_and_other_copies_stay_as_they_were() -> None:
    model = nets.scaled()
    before = copy.deepcopy(model.state_dict())
    net = supernet(model, input_shape=nets.SHAPE)
    other = copy.deepcopy(net)
    plain = fixed(net)
    with torch.no_grad():
        for module in (net, plain):
            for p in module.parameters():
                p.add_(1)
    plain.load_state_dict({k: v + 1 for k, v in plain.state_dict().items()})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(bool((a == 0.01).all()) for a in split_parameters(other)[1])
    assert model.training and net.training


def test_frozen_norms_stay_frozen() -> None:
    model = nets.scaled().train()
    model[2].eval()
    net = supernet(model, input_shape=nets.SHAPE, bits=(2, 4))
    assert all(m.training for m in net.modules() if m is not net[2])  # type: ignore[index]
    assert not net[2].training and not fixed(net)[2].training and fixed(net).training  # type: ignore[index]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", nets.KINDS)
def test_a_checkpoint_continues_exactly(kind: str, share: bool, tmp_path: Path) -> None:
    """Two steps, save, load into a fresh supernet and fresh optimizers, one more step: bit for bit the run that was never stopped."""

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return supernet(nets.KINDS[kind](), input_shape=nets.SHAPE, bits=(2, 4, 7), share=share)

    def optimize(net: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(group, 0.05, 0.9) for group in split_parameters(net)]

    def step(net: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        net(images(4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    net = start(0)
    optimizers = optimize(net)
    for seed in (1, 2):
        step(net, optimizers, seed)
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    states = copy.deepcopy([o.state_dict() for o in optimizers])
    again = start(9)
    zoo.load(again, tmp_path / "net.safetensors")
    fresh = optimize(again)  # behind the loading, which builds Brevitas' own learned scales anew
    assert load_file(tmp_path / "net.safetensors").keys() == again.state_dict().keys()
    for optimizer, state in zip(fresh, states):
        optimizer.load_state_dict(state)
    step(net, optimizers, 3)
    step(again, fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "kept", "count"),
    [
        ("proxylessnas_4b_imagenet", {}, "output", 61),
        ("diracdeltanet_imagenet", {f"{p}{k}_bits": 4 for p in ("", "first_", "last_") for k in ("weight", "act")}, (), 38),
    ],
)
def test_networks_of_other_papers(name: str, options: dict[str, int], kept: str, count: int) -> None:
    """Learned scales, tanh weights, shifts, residual sums: searched as they are, and with sharp shares the fixed network."""
    net = supernet(zoo.get(name, **options), bits=(3, 4), input_shape=(3, 224, 224), fixed=kept).train()
    assert len(layers(net)) == count
    x = torch.rand(2, 3, 224, 224)
    net(x).square().mean().backward()
    assert all(bool((a.grad != 0).any()) for a in split_parameters(net)[1] if a.grad is not None)
    draw(net.eval(), 1, sharp=True)
    with torch.no_grad():
        assert torch.equal(net(x), fixed(net)(x))


# Which activation belongs to which layer.


def test_branches_sums_and_concats_find_their_activations() -> None:
    net = supernet(nets.Branches(), input_shape=nets.SHAPE, bits=(2, 4), input_bits=8)
    by_name = {m.name: m for m in layers(net)}
    assert list(by_name) == ["stem", "left", "right", "joined", "added"]
    act, left, right = (net.get_submodule(n) for n in ("act", "left_act", "right_act"))
    assert by_name["stem"].inputs == (8,)
    assert by_name["left"].inputs == by_name["right"].inputs == (act,)
    assert by_name["joined"].inputs == by_name["added"].inputs == (left, right)
    widths, shares = by_name["joined"].input_shares()
    assert widths == (2, 4, 2, 4) and shares.tolist() == [0.25] * 4
    assert read_bits(net).activations == {"act": 2, "left_act": 2, "right_act": 2}
    draw(net, 4, sharp=True).double().eval()
    x = images().double()
    assert torch.equal(net(x), fixed(net)(x))
    with pytest.raises(SearchError, match="act_bits: act has 2 bits already, right asks for 4"):
        make_bits(net, "22222", "82422")


def test_an_activation_that_feeds_a_kept_layer_keeps_its_width() -> None:
    net = supernet(nets.Branches(), input_shape=nets.SHAPE, fixed=("right", "joined"))
    by_name = {m.name: m for m in layers(net)}
    assert list(by_name) == ["stem", "left", "added"]
    assert by_name["left"].inputs == (4,) and by_name["added"].inputs == (4, 4)
    assert [(k.geometry.name, k.weight_bits, k.act_bits) for k in net.kept_layers] == [("right", 4, 4), ("joined", 4, 4)]  # type: ignore[union-attr]
    assert not any(isinstance(m, MixedActivation) for m in net.modules())


def test_an_activation_in_front_of_a_pool_that_reads_its_scale_keeps_its_width() -> None:
    model = nn.Sequential(
        LearnedScaleReLU(8), ScaledIntConv2d(3, 4, 1, bits=4), LearnedScaleReLU(4, return_quant_tensor=True), TruncAvgPool(2),
        ScaledIntConv2d(4, 2, 1, bits=4),
    )  # fmt: skip
    net = draw(supernet(model, input_shape=nets.SHAPE), 1, sharp=True).double().eval()
    assert [m.inputs for m in layers(net)] == [(net.get_submodule("0"),), (4,)]
    x = images().double()
    assert torch.equal(net(x), fixed(net)(x))


def test_only_and_fixed_are_patterns() -> None:
    net = supernet(nets.scaled(), input_shape=nets.SHAPE, only=["1", "[49]"], fixed="9")
    assert [m.name for m in layers(net)] == ["1", "4"]
    assert isinstance(net.get_submodule("6"), LearnedScaleReLU) and isinstance(net.get_submodule("3"), MixedActivation)


def test_sizes_follow_every_forward() -> None:
    net = supernet(zoo.get("ultranet_dacsdc"), input_shape=(3, 32, 64))
    assert layers(net)[4].geometry().in_size == (2, 4)
    net.eval()(torch.zeros(1, 3, 64, 64))
    assert layers(net)[4].geometry().in_size == (4, 4) and layers(net)[0].geometry().macs == 16 * 27 * 64 * 64


# What cannot be searched says so.

IMAGE = FixedPoint(9, 8)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "has no quantized QuantConv2d or QuantLinear"),
        (lambda: ScaledIntConv2d(3, 4, 3), {}, r"the model itself is a ScaledIntConv2d; put it into an nn.Sequential"),
        (nets.scaled, {"fixed": "nine"}, "fixed='nine' matches no quantized layer; there are"),
        (nets.scaled, {"only": "1", "fixed": "*"}, "leave no layer to search"),
        (nets.scaled, {"bits": ()}, "candidate bits are one or more different positive integers"),
        (nets.scaled, {"bits": (2, 2)}, "candidate bits"),
        (nets.constant, {"bits": (4, 9)}, "4: its quantizer cannot be built with 9 bits .*leave these bits out, or name it in fixed="),
        (lambda: nn.Sequential(LearnedScaleReLU(4), BinaryConv2d(3, 4, 3)), {}, "1: its quantizer .* fixed="),
        (lambda: nn.Sequential(IMAGE, ScaledIntConv2d(3, 4, 1)), {}, r"0 \(FixedPoint\) has one width only"),
        (lambda: nn.Sequential(LearnedScaleReLU(4), nn.BatchNorm2d(3), ScaledIntConv2d(3, 4, 1)), {}, "2: its input is not quantized"),
        (
            lambda: nn.Sequential(nn.Flatten(), LearnedScaleReLU(4, return_quant_tensor=True), ScaledIntLinear(192, 5, bias_bits=12)),
            {},
            "2: its bias is quantized to the scales",
        ),
    ],
)
def test_errors_name_the_layer_and_the_remedy(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        supernet(model(), input_shape=nets.SHAPE, **options)


def test_layers_that_run_twice_or_never_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.conv, self.idle = LearnedScaleReLU(4), ScaledIntConv2d(3, 3, 1), ScaledIntConv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.act(self.conv(self.act(x))))

    with pytest.raises(SearchError, match="conv runs 2 times"):
        supernet(Twice(), input_shape=nets.SHAPE)
    Twice.forward = lambda self, x: self.conv(self.act(x))  # type: ignore[method-assign]
    with pytest.raises(SearchError, match="idle does not run in one forward pass"):
        supernet(Twice(), input_shape=nets.SHAPE)
    assert len(layers(supernet(Twice(), input_shape=nets.SHAPE, fixed="idle"))) == 1


def test_reading_asks_for_a_supernet_and_for_its_own_bits() -> None:
    with pytest.raises(SearchError, match="is no supernet; make one with ql.search.supernet"):
        read_bits(nets.scaled())
    a, b = build("scaled", bits=(2, 4)), build("constant", bits=(2, 4))
    with pytest.raises(SearchError, match="read from another supernet"):
        fixed(a, read_bits(b))
    with pytest.raises(SearchError, match="5 bits are none of its candidates"):
        fixed(a, make_bits(a, "522", "222"))
    with pytest.raises(SearchError, match="has 2 entries for 3 layers"):
        make_bits(a, "22", "222")
    assert isinstance(layers(a)[0], MixedWeights)
