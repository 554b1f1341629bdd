"""DeepBurning-MixQ's networks against recorded runs of the published code, its checkpoints, and their integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.training.detection.head import best_boxes
from zoo._mixq import SETTINGS, parse_bits

NETWORKS = {
    "vggtiny": "vggtiny_cifar10",
    "ultranet": "ultranet_dacsdc",
    "ultranet_ismart": "ultranet_dacsdc",
    "ultranet_bypass": "ultranet_bypass_dacsdc",
    "skynet": "skynet_dacsdc",
    "skynetk5": "skynetk5_dacsdc",
    "skynet_bypass": "skynet_dacsdc",
}
FIXED = [name for name in NETWORKS if name != "skynet_bypass"]
DETECTORS = [name for name in FIXED if name != "vggtiny"]
FLOAT = ("vggtiny", "ultranet", "ultranet_bypass", "skynet", "skynetk5", "skynet_bypass")


@pytest.fixture(scope="module")
def recorded(shared):
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(shared / f"golden/mixq_{name}.npz") as file:
            return dict(file)

    return read


def published(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k[3:]: v for k, v in golden.items() if k.startswith("sd.")}


def built(name: str, golden: dict[str, np.ndarray], **options) -> nn.Module:
    if "bitw" in golden:
        options |= {"weight_bits": str(golden["bitw"]), "act_bits": str(golden["bita"])}
    return zoo.load(zoo.get(NETWORKS[name], **options), published(golden)).eval()


@torch.no_grad()
def run(model: nn.Module, x: np.ndarray):
    return model(torch.from_numpy(x))


def near(ours: Tensor, theirs: np.ndarray, tolerance: float, relative: float = 0.0) -> None:
    """The tolerances at which the recordings are stated; where boxes are exponentials of the head's numbers, relative ones too."""
    assert ours.shape == theirs.shape
    assert (np.abs(ours.numpy() - theirs) <= tolerance + relative * np.abs(theirs)).all()


@pytest.mark.parametrize("name", FIXED)
def test_recorded_runs_of_the_fixed_bit_networks(recorded, name):
    golden = recorded(f"{name}_random")
    if name == "vggtiny":
        near(run(built(name, golden), golden["input"]), golden["output"], 1e-4)
        return
    decoded, (p,) = run(built(name, golden, decode=True), golden["input"])
    near(p, golden["output"], 1e-4)
    near(decoded, golden["output_io"], 1e-4, 1e-4)
    head = run(built(name, golden), golden["input"])
    near(best_boxes(head, golden["input"].shape[-2:])[:, :4], golden["prebox"], 1e-3)  # pixels, means of six boxes


@pytest.mark.parametrize("name", FIXED)
def test_the_same_networks_in_float64(recorded, name):
    golden = recorded(f"{name}_random")
    model = built(name, golden, **({} if name == "vggtiny" else {"decode": True})).double()
    y = run(model, golden["input"].astype(np.float64))
    near(y if name == "vggtiny" else y[1][0], golden["output_f64"], 1e-5)  # standard deviations were taken in float32 there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skynet", "skynetk5"])
def test_whole_images_of_skynet(recorded, name):
    """At 160x320 some activations lie within float32's rounding of a threshold; the bounds are those of the recording."""
    golden = recorded(f"{name}_random")
    _, (p,) = run(built(name, golden, decode=True), golden["full_input_u8"].astype(np.float32) / 256)
    error = np.abs(p.numpy() - golden["full_output"])
    assert np.median(error) <= 1e-5 and np.quantile(error, 0.95) <= 2e-2 and error.max() <= 0.2


@pytest.mark.parametrize("form,name", [*(("float", name) for name in FLOAT), ("dorefa", "ultranet"), ("dorefa", "ultranet_ismart")])
def test_recorded_runs_of_the_float_and_dorefa_forms(recorded, form, name):
    golden = recorded(f"{form}_{name}")
    options: dict = {"quantizer": form}
    options |= {"bypass": True} if name == "skynet_bypass" else {}
    options |= {"setting": "ismart"} if name == "ultranet_ismart" else {}
    options |= {"weight_bits": "4" * 9} if (form, name) == ("dorefa", "ultranet") else {}
    if name == "vggtiny":
        near(run(built(name, golden, **options), golden["input"]), golden["output"], 2e-5)
        return
    decoded, (p,) = run(built(name, golden, decode=True, **options), golden["input"])
    near(p, golden["output"], 2e-5)
    near(decoded, golden["output_io"], 2e-5, 2e-5)


def test_outputs_in_training():
    model = zoo.get("ultranet_dacsdc", decode=True)
    (p,) = model(torch.rand(2, 3, 32, 64))
    assert p.shape == (2, 6, 2, 4, 6) and p.requires_grad
    head = zoo.load(zoo.get("ultranet_dacsdc"), model.state_dict())(torch.rand(1, 3, 32, 64))
    assert head.shape == (1, 36, 2, 4)


def test_float_vggtiny_pools_before_the_norm():
    names = [name for name, _ in zoo.get("vggtiny_cifar10", quantizer="float").layers.named_children()]
    assert names[names.index("conv1") :][:3] == ["conv1", "pool1", "bn1"]
    names = [name for name, _ in zoo.get("vggtiny_cifar10").layers.named_children()]
    assert names[names.index("conv1") :][:3] == ["conv1", "bn1", "pool1"]


COUNTS = {  # parameters, weights and MACs (millions) of the published networks
    "vggtiny": (1_187_274, 1_185_472, 152.805),
    "ultranet": (210_996, 210_096, 199.526),
    "ultranet_bypass": (358_452, 357_552, 229.018),
    "skynet": (362_369, 357_243, 401.203),
    "skynetk5": (382_129, 377_003, 432.333),
    "skynet_bypass": (444_545, 437_883, 465.715),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    """MACs of a detector grow with the area: 160x320 holds 25 times 32x64."""
    options = {"bypass": True} if name == "skynet_bypass" else {}
    model, macs = zoo.get(NETWORKS[name], **options).eval(), []
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda m, x, y: macs.append(y.numel() * m.weight[0].numel()))
    size, times = ((32, 32), 1) if name == "vggtiny" else ((32, 64), 25)
    with torch.no_grad():
        model(torch.rand(1, 3, *size))
    parameters, weights, millions = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(layer.weight.numel() for layer in layers) == weights
    assert round(times * sum(macs) / 1e6, 3) == millions
    if not options:
        assert (zoo.card(NETWORKS[name]).parameters, zoo.card(NETWORKS[name]).macs) == (parameters, times * sum(macs))


# ---------------------------------------------------------------- bits


def test_bits_as_digits_lists_and_settings():
    for options in ({"weight_bits": "822222", "act_bits": [8, 3, 3, 3, 6, 3]}, {}, {"setting": "readme"}):
        model = zoo.get("vggtiny_cifar10", **options)
        assert (model.weight_bits, model.act_bits) == ((8, 2, 2, 2, 2, 2), (8, 3, 3, 3, 6, 3))
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert [m.bits for m in convs] == [8, 2, 2, 2, 2, 2] and model.linear.bits == model.act6.bits == 8
        assert [getattr(model.layers, f"act{i}").bits for i in range(6)] == [8, 3, 3, 3, 6, 3]
    mixed = zoo.get("ultranet_dacsdc", weight_bits=[32] + [4] * 8, act_bits=[8, 32] + [4] * 7)
    assert type(mixed.layers.conv0) is nn.Conv2d and type(mixed.layers.act1) is nn.ReLU
    assert zoo.get("skynet_dacsdc", quantizer="float").weight_bits == ()


def test_every_named_setting_builds():
    for network, rows in SETTINGS.items():
        for name, (w, a) in rows.items():
            model = zoo.get(network, setting=name, width=0.125)
            assert ("".join(map(str, model.weight_bits)), "".join(map(str, model.act_bits))) == (w, a)
            assert name in zoo.card(network).options["setting"]
    assert zoo.get("ultranet_dacsdc", setting="authors").weight_bits == (5, 3, 2, 5, 5, 5, 5, 5, 8)


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("vggtiny_cifar10", {"weight_bits": "82222"}, r"weight_bits='82222' has 5 entries; the network has 6 such layers, conv0 to conv5"),
        ("vggtiny_cifar10", {"act_bits": "83x363"}, r"act_bits='83x363': entry 2 \(of conv2\) is 'x'; bits are 1 to 8"),
        ("vggtiny_cifar10", {"act_bits": "830363"}, r"entry 2 \(of conv2\) is '0'"),
        ("ultranet_dacsdc", {"weight_bits": [4, 4, 9, 4, 4, 4, 4, 4, 4]}, r"entry 2 \(of conv2\) is 9"),
        ("ultranet_dacsdc", {"weight_bits": [4, 4, 4.0, 4, 4, 4, 4, 4, 4]}, r"entry 2 \(of conv2\) is 4.0"),
        ("skynet_dacsdc", {"weight_bits": ""}, "has 0 entries; the network has 13"),
        ("ultranet_dacsdc", {"setting": "best"}, "ultranet_dacsdc has bjtu, ismart, authors"),
        ("ultranet_dacsdc", {"setting": "bjtu", "act_bits": "8" * 9}, "either setting or act_bits"),
        ("ultranet_dacsdc", {"quantizer": "float", "act_bits": "8" * 9}, "'float' has no bits, but act_bits"),
        ("ultranet_dacsdc", {"quantizer": "hwgq"}, "there are mixq, dorefa, float"),
        ("ultranet_dacsdc", {"quantizer": "dorefa", "act_bits": "4" * 9}, "entry 0 is 8, not 4"),
        ("ultranet_dacsdc", {"quantizer": "dorefa", "weight_bits": "144444444"}, r"2 to 8 bits, entry 0 \(of conv0\) is 1"),
        ("vggtiny_cifar10", {"quantizer": "dorefa"}, "detectors only"),
        ("vggtiny_cifar10", {"width": 0}, "width multiplies"),
    ],
)
def test_wrong_options_name_the_place(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.get(name, **options)


def test_parsed_bits_stay_what_they_are():
    assert parse_bits((8, 4), 2, "weight_bits") == parse_bits("84", 2, "weight_bits") == parse_bits(np.array([8, 4]), 2, "") == (8, 4)
    assert parse_bits(4, 3, "weight_bits") == (4, 4, 4)
    assert parse_bits(822222, 6, "weight_bits") == (8, 2, 2, 2, 2, 2)  # as a command line's NAME=VALUE gives it
    assert {type(b) for b in parse_bits(np.array([8, 4]), 2, "")} == {int}


# ---------------------------------------------------------------- checkpoints


def checkpoint(golden: dict[str, np.ndarray]) -> dict:
    """As the published training writes it; float16 recordings as the float32 they stand for."""
    state = {k: torch.from_numpy(np.array(v)) for k, v in published(golden).items()}
    return {
        "epoch": 3,
        "training_results": "3 0.5 0.6",
        "model": {k: v.float() if v.is_floating_point() else v for k, v in state.items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "model_params": {"bitw": [int(c) for c in str(golden["bitw"])], "bita": [int(c) for c in str(golden["bita"])]},
        "extra": {"time": "Mon", "name": "x"},
    }


@pytest.mark.parametrize("name", ["ultranet", "ultranet_bypass", "skynet", "vggtiny"])
def test_published_checkpoints_load_from_a_file(recorded, name, tmp_path):
    golden = recorded(f"{name}_random")
    torch.save(checkpoint(golden), tmp_path / "x_best.pt")
    options = {"weight_bits": str(golden["bitw"]), "act_bits": str(golden["bita"])}
    model = zoo.load(zoo.get(NETWORKS[name], **options), tmp_path / "x_best.pt")
    other = zoo.load(zoo.get(NETWORKS[name], **options), checkpoint(golden))
    expected = built(name, golden).state_dict()
    for loaded in (model, other):
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_a_checkpoint_of_other_bits_is_refused(recorded):
    golden = recorded("ultranet_random")
    content = checkpoint(golden)
    model = zoo.get("ultranet_dacsdc", setting="ismart")
    with pytest.raises(zoo.CheckpointError, match="trained with weight_bits 444444444, the model has 844444448"):
        zoo.load(model, content)
    with pytest.raises(zoo.CheckpointError, match="the model has none"):
        zoo.load(zoo.get("ultranet_dacsdc", quantizer="float"), content)
    content["model_params"]["bita"][3] = 5
    with pytest.raises(zoo.CheckpointError, match="trained with act_bits 844544444"):
        zoo.load(zoo.get("ultranet_dacsdc"), content)


def test_checkpoints_that_do_not_fit(recorded, shared):
    with pytest.raises(zoo.CheckpointError, match="misfit"):
        zoo.load(zoo.get("ultranet_bypass_dacsdc"), published(recorded("ultranet_random")))
    with pytest.raises(zoo.CheckpointError, match="missing"):
        zoo.load(zoo.get("skynet_dacsdc"), published(recorded("ultranet_random")))
    with pytest.raises(zoo.CheckpointError, match="checkpoint of a search.*supernet"):
        zoo.load(zoo.get("ultranet_dacsdc"), published(recorded("supernet_ultranet")))


# ---------------------------------------------------------------- integers


def codes(golden: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(golden["input_u8"])


@pytest.mark.parametrize("name", ["vggtiny", "skynet", "skynetk5"])
def test_every_code_on_the_recorded_images(recorded, name):
    golden = recorded(f"{name}_random")
    model, x = built(name, golden), codes(golden)
    graph = ql.convert(model, tuple(x.shape[1:]))
    check = ql.verify(model, graph, x)
    assert check.ok and sum(row.float32 for row in check.rows) == 0, str(check)  # the images keep clear of thresholds
    p = ql.run(graph, x)
    near(p if name == "vggtiny" else p.reshape(1, 6, 6, *p.shape[2:]).permute(0, 1, 3, 4, 2), golden["output_f64"], 1e-5)


def test_an_image_of_few_bits():
    torch.manual_seed(3)
    model = zoo.get("ultranet_dacsdc", act_bits="544444444", width=0.25).eval()
    graph = ql.convert(model, (3, 32, 32))
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert ql.verify(model, graph, x).ok
    assert (graph.input.type.lo, graph.input.type.hi) == (0, 255)
    with torch.no_grad():
        assert torch.allclose(ql.run(graph, x), model(x.float() / 256), atol=1e-5)  # a sum of floats in another order
    assert torch.equal(ql.run(graph, x), ql.run(graph, x // 8 * 8))  # only the leading five bits count


def test_bypassed_skynet_converts():
    torch.manual_seed(4)
    model = zoo.get("skynet_dacsdc", bypass=True, width=0.125).eval()
    x = torch.randint(0, 256, (1, 3, 16, 32), dtype=torch.uint8)
    assert ql.verify(model, ql.convert(model, (3, 16, 32)), x).ok


def test_decoded_boxes_do_not_convert():
    with pytest.raises(ValueError, match="boxes: sigmoid and exp.*decode=False"):
        ql.convert(zoo.get("ultranet_dacsdc", decode=True).eval(), (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_whole_images_in_integers_and_cpp(recorded, shared, name, tmp_path):
    with np.load(shared / f"golden/mixq_export_{name}.npz") as file:
        golden = dict(file)
    model, x = built(name, golden), codes(golden)
    graph = ql.convert(model, tuple(x.shape[1:]))
    assert ql.verify(model, graph, x).ok
    hls = ql.export(graph, tmp_path / "hls", part="xczu3eg")
    assert torch.equal(ql.run(graph, x), hls.csim(x))
