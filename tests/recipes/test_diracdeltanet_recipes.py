"""The recipes of DiracDeltaNet and ShuffleNetV2: published arguments, whole in their smoke form, resumed, and honest about integers."""

import json
import os
import re
import runpy
import subprocess
import sys
import types
from dataclasses import fields, replace
from math import ceil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantlib.training import CrossEntropy, Distillation, Epoch, load_teacher, refinery
from quantlib.training.data import image_files, random_area
from quantlib.training.smoke import digit_files
from zoo.diracdeltanet import CLIP


def parsed(module, *argv):
    return refinery.options(module.Config(), "", ["--teacher_weights=w.pth", *argv], getattr(module, "HELP", {}), {"expansion": "-e"})


PUBLISHED = {
    "logdir": "./log/log.txt", "resume": False, "lr": 0.5, "lr_policy": "linear", "totalepoch": 90, "batch_size": 1024,
    "weight_decay": 4e-5, "crop_scale": 0.2, "base_channel_size": 116,
}  # fmt: skip
PUBLISHED_BITS = ("weight_bit", "act_bit", "first_weight_bit", "first_act_bit", "last_weight_bit", "last_act_bit", "fc_bit")


def test_defaults_are_the_published_arguments(recipe):
    dirac, shuffle = recipe("diracdeltanet_imagenet"), recipe("shufflenetv2_imagenet")
    for module in (dirac, shuffle):
        config = parsed(module)
        assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED and config.teacher_mode == "eval"
    config = parsed(dirac)
    assert config.expansion == 2.0 and [getattr(config, name) for name in PUBLISHED_BITS] == [32] * 7 == [32] * len(dirac.BITS)
    assert not {"expansion", *PUBLISHED_BITS} & {f.name for f in fields(shuffle.Config)}

    words = "--datadir=d --inputdir in_1.t7 --outputdir=o_1 -r -b 8 --wd 1e-4 -e 1.5 --lr_policy=step --weight_bit=1 --act-bit 4 --fc_bit=8"
    given = parsed(dirac, *words.split())
    wanted = {"datadir": "d", "inputdir": "in_1.t7", "outputdir": "o_1", "resume": True, "batch_size": 8, "weight_decay": 1e-4}
    wanted |= {"expansion": 1.5, "lr_policy": "step", "weight_bit": 1, "act_bit": 4, "fc_bit": 8}
    assert given == replace(config, **wanted)
    with pytest.raises(SystemExit, match="--lr_policy cosine: give linear or step"):
        parsed(dirac, "--lr_policy=cosine")
    with pytest.raises(SystemExit, match="give --teacher_weights, a file of torchvision's resnet50"):
        dirac.main([])
    with pytest.raises(SystemExit, match="--evaluate: give --inputdir"):
        dirac.main(["--evaluate"])


def test_learning_rate_policies(shared):
    """The recipe's two policies are those of the golden tables."""
    golden = np.load(shared / "golden" / "diracdeltanet_refinery.npz")
    steps = int(golden["lr_linear/total_iterations"])
    assert steps == 90 * ceil(1281167 / 1024)
    assert [0.5 * refinery.POLICY["linear"].factor(int(t), steps) for t in golden["lr_linear/iteration"]] == golden["lr_linear/lr"].tolist()
    assert [0.5 * refinery.POLICY["step"].factor(int(e), 90) for e in golden["lr_step/epoch"]] == golden["lr_step/lr"].tolist()


def test_a_line_of_the_published_log():
    more = {"train top-5": 0.75, "test top-5": 1.0, "train cross entropy": 9.0, "test cross entropy": 0.25}
    row = Epoch(3, loss=2.0, train_accuracy=0.5, test_accuracy=0.125, lr=0.1, images=33, more=more)
    assert refinery.log_line(row, batch=8, test_images=1001) == "2 50.0 75.0 10.0 12.5 100.0 0.5"


def test_training_images(tmp_path):
    """Areas of at least crop_scale, no colour shift; the middle 7/8 for testing."""
    config = refinery.Arguments(datadir=str(digit_files(tmp_path)), size=64, crop_scale=0.9)
    train, test = refinery.data(config)
    assert (train.crop, train.lighting, train.size, train.resize, len(train), len(test)) == (0.9, 0.0, 64, 73, 48, 16)
    generator = np.random.default_rng(0)
    areas = [np.prod(random_area(100, 100, generator, 0.9)[2:]) for _ in range(200)]
    assert 0.88e4 < min(areas) < 0.92e4 and max(areas) > 0.97e4  # sides are rounded to pixels
    assert image_files(tmp_path, "train").crop == 0.08


def test_the_loss_is_label_refinery(tmp_path):
    from torchvision.models import get_model

    save_file(get_model("squeezenet1_1", weights=None, num_classes=3).state_dict(), tmp_path / "t.safetensors")
    config = refinery.Arguments(teacher="squeezenet1_1", teacher_weights=str(tmp_path / "t.safetensors"))
    loss = refinery.loss(config, 3)
    assert isinstance(loss, Distillation) and (loss.form, loss.temperature, loss.label_weight) == ("cross entropy", 1.0, 0.0)
    assert not loss.teacher.training and not any(p.requires_grad for p in loss.teacher.parameters())
    assert refinery.loss(replace(config, teacher_mode="train"), 3).teacher.training
    assert isinstance(refinery.loss(replace(config, labels=True), 3), CrossEntropy)


def test_the_published_form_of_a_teacher(tmp_path, monkeypatch):
    """resnet50.t7 is a bare pickled module of a class `models.resnet50.ResNet`: its tensors are read, nothing of it runs."""
    from torchvision.models import get_model

    ours = get_model("squeezenet1_1", weights=None, num_classes=3)
    module = types.ModuleType("models.resnet50")
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.ResNet = type("ResNet", (nn.Module,), {"__module__": module.__name__})

    def pickled(part):
        """The same tree in classes of torch and of the file's own module."""
        if not list(part.children()):
            return part
        whole = nn.Sequential() if isinstance(part, nn.Sequential) else module.ResNet()
        for name, child in part.named_children():
            whole.add_module(name, pickled(child))
        return whole

    torch.save(pickled(ours), tmp_path / "teacher.t7")
    teacher = load_teacher("squeezenet1_1", tmp_path / "teacher.t7", 3)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(teacher.eval()(x), ours.eval()(x))


def test_clip_scalars_are_inherited_on_conversion_only(recipe, tmp_path):
    dirac = recipe("diracdeltanet_imagenet")
    smoke = dirac.Config(smoke=True, base_channel_size=16)
    full = dirac.network(smoke, 2)
    with torch.no_grad():
        full.quant_act1.get_parameter(CLIP).fill_(0.25)
        full.quant_act2.get_parameter(CLIP).fill_(-3.0)
    assert full.quant_act3.get_parameter(CLIP).item() == 10.0
    weights = tmp_path / "full.safetensors"
    save_file({k: v.clone() for k, v in full.state_dict().items()}, weights)

    def clips(config):
        model = dirac.network(config, 2)
        assert torch.equal(model.conv2.weight, full.conv2.weight) and model.conv2.weight is not full.conv2.weight
        return [getattr(model, f"quant_act{n}").get_parameter(CLIP).item() for n in (1, 2, 3)]

    fine = replace(smoke, inputdir=str(weights), weight_bit=4, act_bit=4)
    assert clips(fine) == [0.25, 1.0, 1.0]
    assert clips(replace(fine, evaluate=True)) == [0.25, -3.0, 10.0]
    assert dirac.network(fine, 2).conv2.weight_quant.bit_width().item() == 4  # fine-tuned: the second convolution is one of the blocks'
    scratch = replace(smoke, weight_bit=4, act_bit=4, first_weight_bit=8)
    assert dirac.network(scratch, 2).conv2.weight_quant.bit_width().item() == 8


def test_a_published_file_says_what_it_holds(recipe, tmp_path, monkeypatch):
    """Evaluation takes widths and bits from it, fine-tuning the widths."""
    dirac, path = recipe("diracdeltanet_imagenet"), "DiracDeltaNet_w1a4.t7"
    said = {"base": 128, "blocks": (4, 8, 4), "num_classes": 1000} | dict.fromkeys(dirac.BITS.values(), 8) | {"second_weight_bits": 1}
    monkeypatch.setattr(dirac, "options_of", lambda source: said if source == path else None)
    measured = dirac.options(dirac.Config(inputdir=path, evaluate=True, weight_bit=3), 1000)
    assert measured == said | {"expansion": 2.0, "signs": False, "image": "int8"}
    fine = dirac.options(dirac.Config(inputdir=path, weight_bit=3), 1000)
    assert (fine["base"], fine["weight_bits"], fine["act_bits"], fine["from_scratch"], fine["image"]) == (128, 3, 32, False, None)
    assert dirac.options(dirac.Config(inputdir="full.safetensors"), 7)["base"] == 116


def read(folder):
    report = json.loads((folder / "report.json").read_text())
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>") and "data:image/png;base64," in page
    return report


def exact(folder):
    report = read(folder)
    assert report["verify"]["mismatches"] == 0 and not any(report["cpp_mismatches"].values()) and report["cpp_mismatches"]
    return report


def test_diracdeltanet_imagenet_smoke_and_resume(recipe, tmp_path):
    module = recipe("diracdeltanet_imagenet")
    first = module.main(["--smoke", f"--outputdir={tmp_path}"])
    report, full = exact(tmp_path), read(tmp_path / "full")
    assert report["images"] == {"train": 48, "test": 16} and report["unreadable"] == {}
    scores = report["accuracy"]
    assert scores["model, 8 of sample val, top-1"] == scores["integers, 8 of sample val, top-1"]
    assert "verify" not in full and full["shown"]["integers"].startswith("none: real-valued by weight_bits, act_bits, first_weight_bits")
    (row,) = report["training"]["diracdeltanet_imagenet 4/4"]["epochs"]
    line = [float(word) for word in (tmp_path / "log.txt").read_text().split()]
    wanted = [0, 100 * row["train_accuracy"], 100 * row["more"]["train top-5"], 3 * row["loss"]]  # 48 images in batches of 16
    assert line == [*wanted, 100 * row["test_accuracy"], 100 * row["more"]["test top-5"], row["more"]["test cross entropy"]]
    assert sum(first["seconds"].values()) + sum(full["seconds"].values()) < 180

    weights = (tmp_path / "best.safetensors").read_bytes()
    again = module.main(["--smoke", "-r", "--integer-images=4", f"--outputdir={tmp_path}"])
    assert again["training"] == first["training"] and (tmp_path / "best.safetensors").read_bytes() == weights  # nothing was trained anew


def test_shufflenetv2_imagenet_smoke(recipe, tmp_path, capsys):
    module = recipe("shufflenetv2_imagenet")
    result = module.main(["--smoke", "--labels", f"--outputdir={tmp_path}"])
    assert read(tmp_path)["shown"]["integers"] == "none: ShuffleNetV2 is never quantized" and "verify" not in result
    best = str(tmp_path / "best.safetensors")
    words = [f"--datadir={tmp_path / 'sample'}", f"--inputdir={best}", "--base_channel_size=16", "--size=64", "--workers=0", "--evaluate"]
    measured = module.main([*words, f"--outputdir={tmp_path / 'measured'}"])
    assert measured["accuracy"] == result["accuracy"] and measured["training"] == {}
    assert (
        f"top-1 accuracy: {100 * measured['accuracy']['model, sample val, 16 images, top-1']}, top-5 accuracy: 100.0"
        in capsys.readouterr().out
    )


def test_diracdeltanet_cifar10_smoke_and_resume(recipe, tmp_path):
    module = recipe("diracdeltanet_cifar10")
    assert module.options([]).bits == ("32/32", "4/4", "1/4") and module.widths("32/32") == {}
    assert module.widths("1/4") == {"weight_bits": 1, "act_bits": 4} | dict.fromkeys(
        ("first_weight_bits", "first_act_bits", "last_weight_bits", "last_act_bits", "fc_weight_bits"), 8
    )
    with pytest.raises(SystemExit, match="--bits 4: write WEIGHTS/ACTIVATIONS"):
        module.options(["--bits=4"])

    first = module.main(["--smoke", "--bits=32/32,4/4", f"--out={tmp_path}"])
    own = exact(tmp_path / "w4a4")
    assert own == json.loads(json.dumps(first["networks"]["from it, 4/4"]))
    names = ("full precision", "from it, 32/32", "from it, 4/4")
    assert tuple(first["training"]) == names == tuple(first["top5_lost"]) and list(first["networks"]) == ["from it, 4/4"]
    assert first["top5_lost"]["from it, 32/32"] == {"points": 0.0, "error": 0.0}
    scores = first["accuracy"]
    lost = 100 * (scores["from it, 32/32: top-5, model, digits test"] - scores["from it, 4/4: top-5, model, digits test"])
    assert first["top5_lost"]["from it, 4/4"]["points"] == pytest.approx(lost, abs=1e-9)  # a mean of differences, a difference of means
    assert len(scores) == 3 * 2 + 2 and sum(first["seconds"].values()) < 180

    # an untrained network's last clip is 10, which the published rule makes 1: its logits are ten times as large, and so is the loss
    kept = module.main(["--smoke", "--bits=32/32", "--keep-clips", f"--out={tmp_path / 'kept'}"])
    ruled, free = (r["training"]["from it, 32/32"]["epochs"][0]["loss"] for r in (first, kept))
    assert kept["training"]["full precision"]["epochs"][0]["loss"] == first["training"]["full precision"]["epochs"][0]["loss"]
    assert ruled > 2 * free

    weights = (tmp_path / "w4a4" / "best.safetensors").read_bytes()
    again = module.main(["--smoke", "--bits=32/32,4/4", "--resume", f"--out={tmp_path}"])
    assert again["training"] == first["training"] and again["accuracy"] == scores  # nothing was trained anew
    assert (tmp_path / "w4a4" / "best.safetensors").read_bytes() == weights


def test_the_tutorial_prints_what_it_shows(recipe, root, tmp_path, capsys):
    page = (root / "docs" / "tutorials" / "synetgy.md").read_text(encoding="utf-8")
    (tmp_path / "page.py").write_text("".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)), encoding="utf-8")
    runpy.run_path(str(tmp_path / "page.py"))
    assert capsys.readouterr().out == "".join(re.findall(r"^```text\n(.*?)^```", page, re.S | re.M))
    module = recipe("diracdeltanet_imagenet")
    for command in re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M):
        words = command.replace("\\\n", " ").split()
        config = refinery.options(module.Config(), "", words[words.index("recipes/diracdeltanet_imagenet.py") + 1 :], module.HELP, {})
        assert config.teacher_weights == "resnet50.pth"


@pytest.mark.slow
def test_whole_smoke_of_cifar10(recipe, tmp_path):
    result = recipe("diracdeltanet_cifar10").main(["--smoke", "--bits=32/32,8/8,2/4,1/4", f"--out={tmp_path}"])
    assert list(result["networks"]) == ["from it, 8/8", "from it, 2/4", "from it, 1/4"]
    for name in ("w8a8", "w2a4", "w1a4"):
        exact(tmp_path / name)


@pytest.mark.slow
def test_two_processes(root, tmp_path):
    """The whole recipe under the launcher: both train, one writes the log, converts and reports."""
    digit_files(tmp_path / "data")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    words = [f"--datadir={tmp_path / 'data'}", f"--outputdir={tmp_path}", f"--logdir={tmp_path / 'log.txt'}", "--labels", "--size=64"]
    words += ["--totalepoch=2", "--batch_size=16", "--base_channel_size=16", "--workers=0", "--lr=0.05", "--integer_images=4"]
    words += ["--weight_bit=1", "--act_bit=4", *(f"--{name}=8" for name in PUBLISHED_BITS[2:])]
    command = [*launch, str(root / "recipes/diracdeltanet_imagenet.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(tmp_path)["images"] == {"train": 48, "test": 16} and done.stdout.count("report:") == 1
    assert [line.split()[0] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["0", "1"]
