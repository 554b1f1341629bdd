"""The FuSeConv recipes: published arguments, rates, data and parameters; whole in their smoke form; resumed; integers at the end."""

import json
import re
from dataclasses import replace
from math import floor

import pytest
import torch
from torch import nn

import zoo
from quantlib.training import SGD, RMSprop
from quantlib.training.checkpoint import load_checkpoint
from quantlib.training.data import IMAGENET_MEAN, IMAGENET_STD, random_area_by_height
from quantlib.training.loop import _Run
from quantlib.training.smoke import digit_files


@pytest.fixture(scope="module")
def cifar(recipe):
    return recipe("fuseconv_cifar")


@pytest.fixture(scope="module")
def imagenet(recipe):
    return recipe("fuseconv_imagenet")


# ---------------------------------------------------------------- CIFAR


def test_cifar_arguments_are_the_published_ones(cifar):
    config = cifar.options("-D CIFAR100 -N MobileNetV3L -n runs/a -v full -r".split())
    assert (config.dataset, config.network, config.name, config.variant, config.resume) == (
        "CIFAR100",
        "MobileNetV3L",
        "runs/a",
        ("full",),
        True,
    )
    assert config.data == "cifar-100-python" and (config.epochs, config.batch, config.lr, config.weight_decay) == (60, 128, 0.1, 5e-4)
    assert (config.size, config.seed, config.width) == (224, 42, 1.0) and cifar.options([]).data == "cifar-10-batches-py"
    assert list(cifar.NETWORKS) == ["ResNet", "MobileNetV1", "MobileNetV2", "MobileNetV3S", "MobileNetV3L", "MnasNet"]
    for network in cifar.NETWORKS.values():
        assert {f"{network}{cifar.VARIANTS[v]}_imagenet" for v in ("baseline", "half", "full")} <= set(zoo.names())
    for argv, says in (
        (["-D", "MNIST"], "CIFAR10, CIFAR100"),
        (["-N", "VGG"], "MobileNetV2"),
        (["-v", "half,third"], "third: give baseline"),
    ):
        with pytest.raises(SystemExit, match=says):
            cifar.options(argv)


def test_cifar_in_its_smoke_form_and_resumed(cifar, tmp_path, monkeypatch):
    whole = cifar.main(["--smoke", "-n", str(tmp_path / "whole"), "--save-every", "1"])
    facts = whole["networks"]
    assert (
        list(facts) == ["baseline", "half", "full"]
        and facts["baseline"]["speedup"] == 1 < facts["full"]["speedup"] < facts["half"]["speedup"]
    )
    assert facts["baseline"]["lost"]["digits test"] == {"points": 0.0, "error": 0.0}
    model = zoo.get("mobilenet_v2_fuse_half_imagenet", num_classes=10, width=1 / 8)
    assert facts["half"]["parameters"] == sum(p.numel() for p in model.parameters())
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "points lost" in page and json.loads((tmp_path / "whole" / "report.json").read_text())["networks"] == facts

    save, saves = _Run._save, []

    def dies(self):
        save(self)
        saves.append(1)
        if len(saves) == 5:  # within the second variant
            raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        cifar.main(["--smoke", "-n", str(tmp_path / "cut"), "--save-every", "1"])
    monkeypatch.setattr(_Run, "_save", save)
    again = cifar.main(["--smoke", "-n", str(tmp_path / "cut"), "--save-every", "1", "-r"])
    for variant in facts:
        (a, _), (b, _) = (load_checkpoint(tmp_path / run / variant / "last.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a if k != "seconds")
    assert again["accuracy"] == whole["accuracy"]


def test_the_cifar_rate_follows_from_the_epoch(cifar):
    from quantlib.training import Steps

    schedule = Steps(cifar.options([]).milestones)
    published = [0.1 * 0.1 ** sum(e >= m for m in (20, 40)) for e in range(60)]
    assert [0.1 * schedule.factor(e, 60) for e in range(60)] == published


# ---------------------------------------------------------------- ImageNet


def test_the_trainer_has_the_published_numbers(imagenet):
    config = imagenet.options(["--network", "mobilenet_v3_small_fuse_full_imagenet", "--batch", "1024"])
    assert (config.recipe, config.epochs, config.seed) == ("trainer", 350, 1995) and config.lr == 0.064
    assert imagenet.options([]).lr == 0.016 and imagenet.options([]).batch == 256
    model = imagenet.network(replace(config, width=1 / 8), 10)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    fitted = imagenet.settings(config, model, 1_281_167)
    assert fitted.optimizer == RMSprop(0.9, 0.9, 1e-3) and fitted.weight_decay == 1e-5 and fitted.average == 0.9999 ** (1024 / 4096)
    steps = 1252  # ceil(1281167 / 1024)
    for i in (0, 1, 3000, 5 * steps, 5 * steps + 1, 20_000, 400_000):
        wanted = 0.25 + i / (5 * steps) * 0.75 if i <= 5 * steps else 0.97 ** floor(i / (2.4 * steps))
        assert fitted.schedule.factor(i, 350 * steps) == pytest.approx(wanted, rel=1e-14)  # the line is summed in another order
    (undecayed,) = fitted.groups
    assert undecayed.weight_decay == 0.0
    exempt = {name for name, _ in model.named_parameters() if re.search(undecayed.names, name)}
    of_norms = {f"{n}.{leaf}" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for leaf in ("weight", "bias")}
    assert exempt == of_norms | {"pooled.0.bias"}


def test_the_phases_have_the_published_rates_batches_and_sizes(imagenet, tmp_path):
    argv = ["--network", "resnet50_fuse_half_hybrid_imagenet", "--data", str(digit_files(tmp_path / "data", 8, 4))]
    config = imagenet.options(argv)
    assert (config.recipe, config.epochs, config.batch, config.lr) == ("phases", 52, 512, 0.9)
    model = imagenet.network(replace(config, width=1 / 8), 2)
    fitted = imagenet.settings(config, model, 1_281_167)
    assert fitted.optimizer == SGD(0.9) and fitted.weight_decay == 1e-4 and fitted.groups == ()
    steps = 7
    for epoch in range(52):
        for b in range(1, steps + 1):
            if epoch < 5:
                wanted = 0.9 + 0.9 * (epoch * steps + b) / (5 * steps)
            else:
                ends = (
                    (14, 0.9),
                    (16, 0.39375),
                    (32, 0.039375),
                    (39, 0.0039375),
                    (40, 0.00225),
                    (45, 0.000225),
                    (49, 0.0000225),
                    (52, 0.000039375),
                )
                wanted = next(rate for end, rate in ends if epoch < end)
            assert 0.9 * fitted.schedule.within(epoch, b / steps, 52) == pytest.approx(wanted, rel=1e-14)  # 0.9 is divided out and in
    assert fitted.batches == ((14, 224), (39, 128))
    assert imagenet.settings(imagenet.options([*argv, "--mend"]), model, 100).batches == ((14, 224), (39, 128), (49, 224))
    (norms,) = imagenet.settings(imagenet.options([*argv, "--no-bn-decay"]), model, 100).groups
    assert sum(bool(re.search(norms.names, n)) for n, _ in model.named_parameters()) == 2 * sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )
    train = imagenet.data(config, "train")
    assert [(first, d.size, d.resize, d.crop) for first, d in train.parts] == [
        (0, 128, 145, 0.08),
        (14, 224, 255, 0.08),
        (39, 288, 328, 0.5),
    ]
    assert imagenet.options(["--network", "mobilenet_v1_imagenet"]).recipe == "phases"


def test_images_of_the_trainer(imagenet, tmp_path):
    digit_files(tmp_path, 8, 4)
    config = imagenet.options(["--data", str(tmp_path)])
    ((_, data),) = imagenet.data(config, "train").parts
    assert (data.size, data.resize, data.cut_first, data.resample, data.area) == (224, 256, True, "bicubic", random_area_by_height)
    assert (data.mean, data.std, data.levels, data.lighting) == (IMAGENET_MEAN, IMAGENET_STD, 255, 0.0)
    ((_, pixels),) = imagenet.data(replace(config, weight_bits=4, act_bits=4), "val").parts
    ((x, _),) = pixels.read([torch.arange(2)], None, (0, 0))
    codes = x * 128 + 128
    assert torch.equal(codes, codes.round()) and 0 <= codes.min() and codes.max() <= 255


def test_normalisation_goes_into_the_first_layer(imagenet):
    """Away from the border, a network that reads (p - 128) / 128 with the new state is the old one on normalised images."""
    torch.manual_seed(3)
    for name, stem in (
        ("mobilenet_v3_small_fuse_half_imagenet", lambda m: m.stem[:2]),
        ("resnet50_fuse_half_imagenet", lambda m: nn.Sequential(m.conv1, m.bn1)),
    ):
        model = zoo.get(name, width=1 / 8, num_classes=2).double().eval()
        with torch.no_grad():
            for p in stem(model).parameters():
                p.add_(torch.randn_like(p))
        p = torch.randint(0, 256, (2, 3, 32, 32)).double()
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            wanted = stem(model)((p / 255 - mean) / std)
            model.load_state_dict(imagenet.from_pixels(model.state_dict()))
            found = stem(model)((p - 128) / 128)
        torch.testing.assert_close(found[..., 2:-2, 2:-2], wanted[..., 2:-2, 2:-2], rtol=0, atol=1e-4)  # the state is float32


def test_refused_arguments(imagenet):
    for argv, says in (
        (["--recipe", "fast"], "trainer or phases"),
        (["--weight-bits", "4"], "together"),
        (["--weight-bits", "4", "--act-bits", "4"], "--start"),
    ):
        with pytest.raises(SystemExit, match=says):
            imagenet.options(argv)
    with pytest.raises(zoo.ZooError):
        imagenet.options(["--network", "mobilenet_v9_imagenet"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", ["mobilenet_v2_fuse_half_imagenet", "mobilenet_v1_fuse_full_imagenet", "mnasnet_b1_fuse_half_hybrid_imagenet"]
)
def test_imagenet_in_its_smoke_form(imagenet, network, tmp_path):
    result = imagenet.main(["--smoke", "--network", network, "--out", str(tmp_path)])
    assert result["verify"]["mismatches"] == 0 and not any(result["cpp_mismatches"].values())
    sample = [v for k, v in result["accuracy"].items() if "8 of" in k]
    assert len(sample) == 2 and sample[0] == sample[1]
    assert (tmp_path / "real" / "report.html").is_file() and (tmp_path / "hls").is_dir()
    best, _ = load_checkpoint(tmp_path / "real" / "best.safetensors")
    last, _ = load_checkpoint(tmp_path / "real" / "last.safetensors")
    averaged = {k.removeprefix("average/") for k in last if k.startswith("average/")}
    assert bool(averaged) == (not network.startswith("mobilenet_v1"))
    if averaged:  # one epoch: the best weights are the averages at its end
        assert all(torch.equal(best[k], last[f"average/{k}"]) for k in averaged)
