"""The DeepBurning-MixQ recipes: published settings and names, the flow in its smoke form, and what the two share."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from quantlib.io.checkpoints import CheckpointError
from quantlib.training import SGD, Cosine, CrossEntropy
from quantlib.training.checkpoint import save_checkpoint
from quantlib.training.mixq import ALPHAS, RESULT, Known, Priced, add_result, build, known, price_of, stated_bits, weights_file
from quantlib.training.optim import split_parameters


def test_published_settings_of_cifar(recipe):
    module = recipe("mixq_cifar10")
    found, fixed = module.Search(), module.Train()
    assert (found.epochs, found.batch_size, found.lr, found.lra, found.cd) == (40, 128, 0.1, 0.1, 3e-5)
    assert (fixed.batch_size, fixed.lr) == (128, 0.03) and module.Use().batch_size == 64
    plan = module.settings(fixed, 200)
    assert (plan.optimizer, plan.weight_decay, plan.schedule, plan.groups) == (SGD(0.9), 5e-4, Cosine(0.01), ())
    assert (plan.shift, plan.flip, plan.images, plan.drop_last) == (4, True, 0, False)


def test_published_settings_of_detection(recipe):
    """Rates and momenta of every epoch, as published: interpolated for biases up to epoch n, half a cosine for all."""
    module = recipe("mixq_dacsdc")
    found, fixed = module.Search(), module.Train()
    assert (found.epochs, found.batch_size, found.lr, found.lra, found.cd, fixed.epochs, fixed.lr) == (35, 64, 0.01, 0.01, 1e-5, 200, 0.01)
    plan = module.settings(fixed, 400)  # 7 steps of 64: n = max(round(30 / 7), 3) = 4
    assert (plan.optimizer, plan.weight_decay, plan.schedule) == (SGD(0.937, nesterov=True), 0.0, Cosine(0.001))
    (bias,) = plan.groups
    for epoch in range(12):
        cosine = (1 + np.cos(np.pi * epoch / 200)) / 2 * 0.999 + 0.001
        rate = np.interp(epoch, [0, 4], [0.1, 0.02]) if epoch <= 4 else 0.02 * cosine
        momentum = np.interp(epoch, [0, 4], [0.9, 0.937])
        # rates are factors of the first one here, and numbers of their own in the formula: another order of products and cosines
        assert bias.lr * bias.schedule.factor(epoch, 200) == pytest.approx(rate, rel=1e-12)
        assert 0.937 * bias.momentum_schedule.factor(epoch, 200) == pytest.approx(momentum, rel=1e-12)
        assert plan.schedule.factor(epoch, 200) == pytest.approx(cosine, rel=1e-12)
    assert module.settings(fixed, 1000).groups[0].schedule.over == 3 and module.settings(fixed, 64).groups[0].schedule.over == 30
    assert module.settings(fixed, 64, real=True).schedule == Cosine(0.01)
    net = zoo.get("ultranet_dacsdc")
    parts = split_parameters(net.named_parameters(), plan.groups)
    assert len(parts[0][1]) == 9 and len(parts[1][1]) == 9 + 8  # eight norms and the head have biases
    convs = module.settings(module.Train(decay_weights=True), 64).groups[1]
    assert [convs.weight_decay, len(split_parameters(net.named_parameters(), (convs,))[0][1])] == [4.84e-4, 9]


NAMES = {
    "UltraNet_MixQ": "ultranet_dacsdc", "UltraNet_FixQ": "ultranet_dacsdc", "UltraNetBypass_MixQ": "ultranet_bypass_dacsdc",
    "UltraNet_Bypass": "ultranet_bypass_dacsdc", "UltraNet_Bypass_FixQ": "ultranet_bypass_dacsdc", "SkyNet": "skynet_dacsdc",
    "SkyNet_MixQ": "skynet_dacsdc", "SkyNetk5": "skynetk5_dacsdc", "SkyNetk5_FixQ": "skynetk5_dacsdc", "SkyNetk5_MixQ": "skynetk5_dacsdc",
    "ultranet_dacsdc": "ultranet_dacsdc",
}  # fmt: skip


def test_published_class_names(recipe):
    classes = recipe("mixq_dacsdc").CLASSES
    assert {name: known(classes, name).network for name in NAMES} == NAMES
    assert not any(known(classes, name).real for name in NAMES)
    assert known(classes, "SkyNetBypassFloat") == Known("skynet_dacsdc", {"quantizer": "float", "bypass": True})
    assert known(classes, "UltraNet_ismart").options == {"quantizer": "dorefa", "setting": "ismart"}
    for kind in classes.values():
        assert isinstance(build(kind), nn.Module)
    cifar = recipe("mixq_cifar10").CLASSES
    for name in ("VGGtiny_MixQ", "VGG_tiny_FixQ", "VGG_tiny", "VGGtiny", "vggtiny_cifar10"):
        assert known(cifar, name) == Known("vggtiny_cifar10")
    assert known(cifar, "VGGtinyFloat").real
    with pytest.raises(SystemExit, match="--model VGG_small: there are VGGtiny"):
        known(cifar, "VGG_small")
    with pytest.raises(SystemExit, match="82222.*5 entries"):
        build(known(cifar, "VGGtiny"), "82222", "833363")


def test_readme_flags(recipe):
    """The published README's lines, word by word behind the script's name."""
    from quantlib.training.flags import parse

    cifar, boxes = recipe("mixq_cifar10"), recipe("mixq_dacsdc")

    def read(module, kind, short, words):
        return parse(kind(), "", module.HELP, words.split(), short)

    found = read(cifar, cifar.Search, cifar.SHORT, "--cd 3e-5 --name mix_vggtiny_cifar_cd3e5 --noshare --bd 0.5 --lra 0.2 --cdt 1e-5")
    assert (found.cd, found.name, found.no_share, found.bram_decay, found.lra, found.cdt) == (
        3e-5, "mix_vggtiny_cifar_cd3e5", True, 0.5, 0.2, 1e-5,
    )  # fmt: skip
    fixed = read(cifar, cifar.Train, None, "--bitw 822222 --bita 833363 --name vggtiny_cifar_cd3e5")
    assert (fixed.bitw, fixed.bita, fixed.name) == ("822222", "833363", "vggtiny_cifar_cd3e5")
    found = read(boxes, boxes.Search, boxes.SHORT, "--cd 1e-5 --name n --model UltraNetBypass_MixQ --bram-decay 2 --no-share")
    assert (found.model, found.bram_decay, found.no_share) == ("UltraNetBypass_MixQ", 2.0, True)
    used = read(boxes, boxes.Use, boxes.SHORT_USE, "-m SkyNet_FixQ -w w -c c.txt -bs 8 -nb 3 -v --save-pic -bp --datapath d --img-size 320")
    assert (used.model, used.weights, used.config, used.batch_size, used.batches) == ("SkyNet_FixQ", "w", "c.txt", 8, 3)
    assert used.verbose and used.save_pic and used.bypass and used.test == "d"


def test_prices_join_the_loss():
    alpha = torch.tensor(2.0, requires_grad=True)
    outputs, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    loss = Priced(CrossEntropy(), {"a": (0.5, lambda: alpha**2), "b": (0.0, lambda: 1 / (alpha - 2))}, gain=4.0)
    value = loss(outputs, labels, outputs)
    value.backward()
    assert value.item() == pytest.approx(np.log(4) + 4 * 0.5 * 4, rel=1e-6) and float(alpha.grad) == 4 * 0.5 * 4  # float32
    assert repr(loss) == "Priced(CrossEntropy(smoothing=0.0), {'a': 0.5, 'b': 0.0}, gain=4.0)"


def test_prices_of_published_settings():
    """Sums of MAC over packing factors that the published networks have at their named bits, to the printed digits."""
    kinds = {
        ("vggtiny_cifar10", (3, 32, 32), ("linear",)): (("822222", "833363", 12.209),),
        ("ultranet_dacsdc", (3, 160, 320), ()): (("444444444", "844444444", 36.941), ("844444448", "844444444", 40.704)),
    }
    for (name, shape, fixed), rows in kinds.items():
        for bitw, bita, dsps in rows:
            facts = price_of(Known(name), build(Known(name), bitw, bita), shape, fixed)
            assert (facts["bitw"], facts["bita"], round(facts["dsps"], 3)) == (bitw, bita, dsps)
    half = Known("vggtiny_cifar10", {"width": 0.5})
    facts = price_of(half, build(half, "444444", "444444"), (3, 32, 32), ("linear",))
    assert facts["bitops"] == pytest.approx(16 * (1.769472 / 2 + (152.764416 - 1.769472) / 4), rel=1e-9)  # MAC in millions; sums of floats
    assert price_of(Known("vggtiny_cifar10"), build(Known("vggtiny_cifar10", {"quantizer": "float"})), (3, 32, 32), ("linear",)) == {}
    assert price_of(Known("vggtiny_cifar10"), build(Known("vggtiny_cifar10"), "822221"), (3, 32, 32), ("linear",)) == {
        "bitw": "822221",
        "bita": "833363",
    }


def test_bits_of_checkpoints(tmp_path):
    torch.save({"model": {}, "extra": {"bestw": "822", "besta": "833"}, "epoch": 3}, tmp_path / "search.pt")
    torch.save({"model": {}, "model_params": {"bitw": [8, 4], "bita": [4, 4]}, "extra": {"name": "n"}}, tmp_path / "fixed.pt")
    assert stated_bits(tmp_path / "search.pt") == ("822", "833") and stated_bits(tmp_path / "fixed.pt") == ("84", "44")
    save_checkpoint(tmp_path / "a/best.safetensors", {}, {"notes": {"bestw": "23", "besta": "45"}})
    save_checkpoint(
        tmp_path / "a/last.safetensors", {}, {"rows": [{"notes": {"bitw": "1", "bita": "1"}}, {"notes": {"bitw": "67", "bita": "78"}}]}
    )
    assert stated_bits(weights_file(tmp_path, "a")) == ("23", "45") and stated_bits(weights_file(tmp_path, "a", "last")) == ("67", "78")
    assert weights_file(tmp_path, str(tmp_path / "fixed.pt")) == tmp_path / "fixed.pt"
    np.savez(tmp_path / "w.npz", **{"model_params.bitw": np.array([2, 3]), "model_params.bita": np.array([4, 5])})
    assert stated_bits(tmp_path / "w.npz") == ("23", "45")
    with pytest.raises(SystemExit, match="b: neither a file nor a run below"):
        weights_file(tmp_path, "b")


def test_results_csv(tmp_path):
    path = tmp_path / "results.csv"
    for _ in range(2):
        add_result(path, {"kind": "fixed", "name": "a, b", "bitw": "84", "dsps": 3})
    add_result(path, {"kind": "mixed", "name": "c"})
    with open(path) as file:
        rows = list(csv.reader(file))
    assert [len(row) for row in rows] == [len(RESULT)] * 2 == [16, 16]
    assert rows[0] == ["fixed", "a, b", "", "", "", "84", "", "", "", "", "", "", "", "", "3", ""]
    with pytest.raises(ValueError, match="no column best"):
        add_result(path, {"best": 1})


def test_detection_flow(recipe, tmp_path):
    """Search, training with the bits found, a resumed end of it, test with pictures, published files and both integer networks."""
    main, out = recipe("mixq_dacsdc").main, f"--out={tmp_path}"
    found = main(["search", "--smoke", out, "--name=mix"])
    assert len(found["bestw"]) == len(found["besta"]) == 9 and (tmp_path / "mix" / "history.png").is_file()
    flags = ["--smoke", out, "--name=net", "--mixm=mix", "--cpp-images=0", "--verify-images=2"]
    result = main(["train", *flags])
    assert (result["bitw"], result["bita"]) == (found["bestw"], found["besta"])
    # the model in float32 and the integers decoded in float64 give boxes that differ by roundings
    assert result["verify"]["mismatches"] == 0 and result["IoU"]["model, test"] == pytest.approx(result["IoU"]["integers, test"], abs=1e-5)
    page = (tmp_path / "net" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and (tmp_path / "net" / "boxes.png").is_file()
    assert main(["train", *flags, "--resume"])["training"] == result["training"]
    with open(tmp_path / "results.csv") as file:
        kinds = [row[0] for row in csv.reader(file)]
    assert kinds == ["mixed", "fixed"]
    tested = main(["test", "--smoke", out, "-w", "net", "-bs", "5", "--save-pic", "-v"])
    # batches of another size: float32 sums in another order
    assert tested["IoU"] == pytest.approx(result["IoU"]["model, test"], abs=1e-6) and len(tested["pictures"]) == tested["images"] == 12
    assert len(list((tmp_path / "net" / "pictures").glob("*.png"))) == 12
    both = main(["simulate", "--smoke", out, "--name=net"])
    assert set(both["upstream"]["IoU"]) == {"published integers (upstream)", "our integers", "model"}
    assert json.loads((tmp_path / "net" / "simulation.json").read_text()) == json.loads(json.dumps(both))


def test_alphas_are_a_group(recipe):
    import quantlib as ql

    net = ql.search.supernet(zoo.get("ultranet_dacsdc"), input_shape=(3, 32, 64))
    alphas = recipe("mixq_cifar10").Group(ALPHAS)
    (_, chosen), (_, rest) = split_parameters(net.named_parameters(), (alphas,))
    assert len(chosen) == 18 and sum(p.numel() for p in rest) == 210_996


def test_commands(recipe, capsys):
    for name in ("mixq_cifar10", "mixq_dacsdc"):
        module = recipe(name)
        for words, code in ((["--help"], 0), ([], 2), (["serch"], "'serch' is no command"), (["train", "--help"], 0)):
            with pytest.raises(SystemExit) as end:
                module.main(words)
            assert end.value.code == code
        assert "--bitw" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixq_cifar10", "mixq_dacsdc"])
def test_smoke(recipe, tmp_path, name):
    done = recipe(name).main(["all", "--smoke", f"--out={tmp_path}"])
    seconds = sum(sum(done[step]["seconds"].values()) for step in ("search", "train", "export"))
    assert seconds < 180
    for step in ("train", "export"):
        assert done[step]["verify"]["mismatches"] == 0 and not any(done[step]["cpp_mismatches"].values()) and done[step]["cpp_mismatches"]
    folder = tmp_path / done["train"]["config"]["name"]
    assert any("codes that differ" in line for line in done["export"]["differences"]["upstream"])
    assert "codes that differ from the model" in (folder / "export" / "report.html").read_text()
    assert {file.name for file in (folder / "export" / "published").iterdir()} == {"config.h", "weights.hpp", "model_param.npz"}
    assert (folder / "hls").is_dir() and (folder / "export" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags",
    [
        ("mixq_dacsdc", ["--bypass"]),
        ("mixq_dacsdc", ["--model=SkyNet", "--adam"]),
        ("mixq_dacsdc", ["--model=SkyNetFloat"]),
        ("mixq_dacsdc", ["--model=UltraNet_ismart", "--decay-weights"]),
        ("mixq_cifar10", ["--model=VGGtinyFloat"]),
    ],
)
def test_other_networks(recipe, tmp_path, name, flags):
    result = recipe(name).main(["train", "--smoke", f"--out={tmp_path}", *flags])
    assert "verify" not in result or result["verify"]["mismatches"] == 0
    if "--bypass" in flags:
        both = recipe(name).main(["simulate", "--smoke", f"--out={tmp_path}", *flags])
        assert set(both) >= {"upstream", "corrected"}


def test_bits_of_a_file_that_is_no_checkpoint(tmp_path):
    """A damaged .pt says so by its name; one that holds something else states no bits."""
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match="cut.pt"):
        stated_bits(tmp_path / "cut.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"extra": None, "model_params": {"bitw": [8, 2], "bita": [8, 3]}}, tmp_path / "fixed.pt")
    assert stated_bits(tmp_path / "list.pt") == ("", "") and stated_bits(tmp_path / "fixed.pt") == ("82", "83")
