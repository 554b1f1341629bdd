"""The ProxylessNAS recipe: the published commands, tables and rules, and everything once in its smoke form."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from quantlib.training import Images, image_files
from quantlib.training.autoaugment import autoaugment
from quantlib.training.optim import split_parameters, torch_groups
from zoo.proxylessnas import REDUCED

COMMON = (
    "--batch-size 96 --label-smoothing 0.1 --workers 10 --weight-decay 3e-5 --quant-type INT --bit-width 4 --first-layer-bit-width 8 "
    "--weight-scaling-impl-type STATS --hard-tanh-threshold 10 --lr-schedule step --finetune --print-freq 10"
)
COMMANDS = {  # as published, the paths aside
    1: f"{COMMON} --epochs 60 --lr 0.005 --milestones 15,30,45 --depthwise-bit-width 4 --resume float.pth",
    2: f"{COMMON} --epochs 20 --lr 0.0001 --milestones 5,10,15 --depthwise-bit-width 5 --bn-no-wd --dropout-rate 0.2 --dropout-steps 32 "
    "--resume best.pth.tar",
}
RATES = {  # by the table of both commands
    1: [0.005] * 15 + [0.005 * 0.1] * 15 + [0.005 * 0.1**2] * 15 + [0.005 * 0.1**3] * 15,
    2: [0.0001] * 5 + [0.0001 * 0.1] * 5 + [0.0001 * 0.1**2] * 5 + [0.0001 * 0.1**3] * 5,
}


@pytest.fixture(scope="module")
def recipe(recipe):
    return recipe("proxylessnas_imagenet")


@pytest.mark.parametrize("number", [1, 2])
def test_published_commands_are_the_defaults(recipe, number):
    defaults = recipe.options(["--resume=float.pth", "--finetune"])
    given = recipe.options(COMMANDS[number].split())
    assert given.steps == (number,)  # the command of one step does not go on with the other
    assert recipe.of_step(given, number) == recipe.of_step(defaults, number) == recipe.STEPS[number]
    ours = recipe.settings(given, recipe.of_step(given, number), together=3)
    assert ours == recipe.settings(defaults, recipe.of_step(defaults, number), together=3)
    assert (ours.batch, ours.weight_decay, ours.optimizer.momentum, ours.optimizer.nesterov) == (288, 3e-5, 0.9, False)
    assert (ours.drop_last, ours.flip, ours.shift, ours.seed, ours.precision) == (True, False, 0, 123456, "no")
    assert [ours.lr * ours.schedule.factor(e, ours.epochs) for e in range(ours.epochs)] == RATES[number]
    assert defaults.steps == (1, 2) and not (defaults.mix_rate or defaults.warmup) and defaults.mix_prob == 0.5
    trained, loss = recipe.wrapped(given, recipe.of_step(given, number), zoo.get("proxylessnas_4b5b_imagenet", **SMALL))
    assert repr(loss) == "MeanOverSamples(CrossEntropy(smoothing=0.1))"
    assert (repr(trained) == "DropoutSamples(samples=32, rate=0.2)") == (number == 2)


SMALL = {"width": 1 / 8, "stages": REDUCED, "image_size": 32, "num_classes": 2}


@pytest.mark.parametrize("name", ["step", "linear", "cosine"])
def test_learning_rates_with_warmup(recipe, name):
    w, epochs, lr = 5, 60, 0.005
    config = recipe.options(["--resume=f.pth", f"--lr-schedule={name}", f"--warmup={w}", "--steps=1"])
    ours = recipe.settings(config, recipe.of_step(config, 1))
    closed = {
        "step": lambda e: lr * 0.1 ** sum(m <= e for m in (15, 30, 45)),
        "linear": lambda e: lr * (1 - (e - w) / (epochs - w)),
        "cosine": lambda e: lr / 2 * (1 + math.cos(math.pi * (e - w) / (epochs - w))),
    }[name]
    table = [lr * ((e + 1) / w) if e < w else closed(e) for e in range(epochs)]
    assert [ours.lr * ours.schedule.factor(e, epochs) for e in range(epochs)] == table


def test_batch_norm_has_no_decay_in_step_2_only(recipe):
    config, model = recipe.options(["--resume=f.pth"]), zoo.get("proxylessnas_4b5b_imagenet", **SMALL)
    decay = {}
    for number in (1, 2):
        how = recipe.settings(config, recipe.of_step(config, number))
        parts = split_parameters(model.named_parameters(), how.groups)
        optimizer = how.optimizer.build(torch_groups(parts), how.lr, how.weight_decay)
        decay[number] = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert {(g["lr"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(how.lr, 0.9, False)}
    named = dict(model.named_parameters())
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 19 and any(n.endswith("scaling_impl.value") for n in named)
    for name, p in named.items():
        assert decay[1][id(p)] == 3e-5
        assert decay[2][id(p)] == (0.0 if name.rpartition(".")[0] in norms else 3e-5), name


@pytest.mark.parametrize(
    "flags,text",
    [
        ("--resume f --quant-type BINARY", "only INT is supported"),
        ("--resume f --weight-scaling-impl-type PARAMETER", "only STATS is supported"),
        ("--resume f --optimizer-batch-size 512", "only -1 is supported"),
        ("--resume f --norm-input", "no integer grid"),
        ("--resume f --lr-schedule poly", "give step, linear, cosine"),
        ("--resume f --mix-type blend", "give cutmix, mixup"),
        ("--resume f --steps 2,1", "give 1,2 or 1 or 2"),
        ("--resume f --steps 1,2 --depthwise-bit-width 4", "the two steps differ by it"),
        ("--resume f --depthwise-bit-width 3", "give --steps 1 or --steps 2"),
        ("", "weights of the float network"),
        ("--steps 2", "step 1's best weights"),
        ("--evaluate", "the weights to measure"),
        ("--steps 0,1,2", "give --epochs and --lr"),
    ],
)
def test_what_is_refused(recipe, flags, text):
    with pytest.raises(SystemExit, match=text):
        recipe.options(flags.split())


def test_other_bits_are_measured_and_trained_as_one_step(recipe):
    assert recipe.options(["--compute-micronet-cost", "--depthwise-bit-width=3"]).steps == (1, 2)
    assert recipe.of_step(recipe.options("--resume f --steps 2 --depthwise-bit-width 3".split()), 2).depthwise_bit_width == 3


class Fixed(nn.Module):
    """Logits that the pixels state: a float network of the recipe's form, which is to run in full float32."""

    def __init__(self):
        super().__init__()
        self.output = nn.Identity()

    def pooled(self, x):
        assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        return (128 * x + 128)[:, :, 0, 0]


def test_ties_go_to_the_lowest_class(recipe, tmp_path):
    from PIL import Image

    rows = [
        ((9, 9, 1), 0, True),
        ((9, 9, 1), 1, False),
        ((1, 7, 7), 1, True),
        ((1, 7, 7), 2, False),
        ((0, 0, 0), 0, True),
        ((1, 2, 3), 2, True),
    ]
    for n, (pixel, label, _) in enumerate(rows):
        path = tmp_path / "val" / str(label) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), pixel).save(path)
    data = image_files(tmp_path, "val", size=2, resize=2, levels=128, mean=(1.0,) * 3, std=(1.0,) * 3)
    right = sum(wins for *_, wins in rows)
    for batch in (1, 2, 6):
        assert recipe.top1(Fixed(), data, batch, 0) == (right, 6, 5)


def test_integer_logits(recipe):
    """round(logit / scale) of the float pass is the integer that the converted network computes."""
    import quantlib as ql

    torch.manual_seed(5)
    model = zoo.get("proxylessnas_4b5b_imagenet", **SMALL).eval()
    codes = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    graph = ql.convert(model, (3, 32, 32))
    with torch.no_grad():
        ours = recipe.logits(model, (codes.float() - 128) / 128)
        scale = (model.pooled(codes).scale * model.output.quant_weight().scale).double()
    assert ours.dtype == torch.int64 and torch.equal((ql.run(graph, codes).double() / scale).round().long(), ours)
    few = Images(codes, torch.zeros(3, dtype=torch.long), "made")
    assert torch.equal(recipe.model_classes(model, few), ours.argmax(1))


def test_integer_logits_of_the_golden(recipe, shared):
    with np.load(shared / "golden" / "proxylessnas_4b_5b_random.npz") as golden:
        codes, wanted = torch.from_numpy(golden["input_u8"]), torch.from_numpy(golden["logit_int"].astype(np.int64)).flatten()
        state = {key[3:]: golden[key] for key in golden.files if key.startswith("sd/")}
    model = zoo.load(zoo.get("proxylessnas_4b5b_imagenet"), state).eval()
    with torch.no_grad():
        assert torch.equal(recipe.logits(model, (codes[None].float() - 128) / 128)[0], wanted)


def read(folder):
    report = json.loads((folder / "report.json").read_text())
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>") and "data:image/png;base64," in page
    assert report["verify"]["mismatches"] == 0 and not any(report["cpp_mismatches"].values()) and report["cpp_mismatches"]
    return report


def test_smoke(recipe, tmp_path, capsys):
    result = recipe.main(["--smoke", f"--out={tmp_path}"])
    said, report = capsys.readouterr().out, read(tmp_path)
    assert report["images"] == {"train": 64, "test": 32} and report["unreadable"] == {} and report["cpp_images"] == 4
    assert list(report["training"]) == ["step 1, all 4 bits", "step 2, depthwise 5 bits"]
    assert "has no learned scales" in said and said.count("weights of ") == 2
    assert "the lowest of them counts" in said and f"Micronet cost: {result['micronet_cost']}" in said
    assert report["top1"]["images"] == 32 and report["top1"]["right"] / 32 == report["accuracy"]["model, sample val, 32 images"]
    assert report["accuracy"]["model, 16 of sample val"] == report["accuracy"]["integers, 16 of sample val"]
    row = report["training"]["step 2, depthwise 5 bits"]["epochs"][0]
    assert row["images"] == 64 and row["lr"] == 0.0001 and row["more"]["test loss"] > 0.3
    kinds = json.loads((tmp_path / "step2" / "best.json").read_text())["run"]["kinds"]
    assert kinds["trained_as"] == "DropoutSamples(samples=32, rate=0.2)" and "'bn'" in kinds["groups"]
    assert sum(result["seconds"].values()) < 180

    best = tmp_path / "step2" / "best.safetensors"
    weights = best.read_bytes()
    again = recipe.main(["--smoke", "--cpp-images=0", f"--out={tmp_path}"])
    assert again["training"] == result["training"] and again["top1"] == result["top1"]  # nothing was trained anew
    assert best.read_bytes() == weights and "goes on from" in capsys.readouterr().out

    shape = ["--reduced", "--width=0.125", "--size=32", "--workers=0", "--batch-size=8"]
    measured = recipe.main(["--evaluate", f"--resume={best}", f"--data={tmp_path / 'sample'}", *shape])
    assert list(measured["top1"]) == list(result["top1"].values())  # in batches of 8 instead of 16
    (tmp_path / "sample" / "train").rename(tmp_path / "elsewhere")  # measuring needs no training images
    assert recipe.main(["--evaluate", f"--resume={best}", f"--data={tmp_path / 'sample'}", *shape]) == measured
    priced = recipe.main(
        ["--compute-micronet-cost", f"--resume={tmp_path / 'step1' / 'best.safetensors'}", "--steps=1", *shape[:3], "--mix-rate=1"]
    )
    assert 0 < priced["micronet_cost"] < result["micronet_cost"]  # 4 bits against 5 around depthwise layers


def test_training_images_are_those_of_the_submission(recipe, tmp_path, monkeypatch):
    """(u8 - 128) / 128 of AutoAugment on a random area, no flip, no lighting."""
    seen = {}

    def stop(model, train, *rest, **keywords):
        seen["train"] = train
        raise SystemExit

    monkeypatch.setattr(recipe, "fit", stop)
    with pytest.raises(SystemExit):
        recipe.main(["--smoke", f"--out={tmp_path}"])
    train = seen["train"]
    assert train.policy is autoaugment and (train.lighting, train.crop, train.levels) == (0.0, 0.08, 128)
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert torch.equal(train.normalised(codes)[0], (torch.arange(256).reshape(16, 16) - 128) / 128)


def test_published_costs(recipe, capsys):
    assert recipe.main(["--compute-micronet-cost"])["micronet_cost"] == 0.5558137893676758
    assert "Micronet cost: 0.5558137893676758" in capsys.readouterr().out
    assert recipe.main(["--compute-micronet-cost", "--steps=1"])["micronet_cost"] == float(np.float32(0.5118764285488666))


@pytest.mark.slow
def test_two_processes_and_mixed_images(root, tmp_path):
    """Both steps under the launcher, with CutMix: both processes train, one converts and reports."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [*launch, str(root / "recipes/proxylessnas_imagenet.py"), "--smoke", "--mix-rate=1", f"--out={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read(tmp_path)
    assert report["images"] == {"train": 64, "test": 32} and done.stdout.count("report:") == 1
    assert report["training"]["step 1, all 4 bits"]["epochs"][0]["images"] == 64


@pytest.mark.slow
def test_float_network_first(recipe, tmp_path):
    result = recipe.main(["--smoke", "--steps=0,1,2", "--lr=0.01", f"--out={tmp_path}"])
    assert list(result["training"])[0] == "float" and len(result["training"]) == 3
