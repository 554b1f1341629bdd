"""The FracBNN recipes: whole in their smoke form, resumed, and with the published settings as defaults."""

import json
import os
import subprocess
import sys

import pytest


def test_defaults_are_the_published_settings(recipe):
    cifar, imagenet = recipe("fracbnn_cifar10"), recipe("fracbnn_imagenet")
    c, i = cifar.options([]), imagenet.options(["--teacher-weights=w.pth"])
    assert (c.steps, c.epochs, c.batch, c.lr, c.gtarget) == ((1, 2), 250, 128, 1e-3, 0.0)
    assert (i.steps, i.epochs, i.batch, i.lr, i.gtarget, i.teacher, i.teacher_mode) == ((1, 2), 120, 256, 5e-4, 0.0, "resnet50", "train")
    for module in (cifar, imagenet):
        assert module.WEIGHT_DECAY[1] == 1e-5 and module.WEIGHT_DECAY[2] == 0
    assert [cifar.SCHEDULE[1].factor(e, 250) for e in (0, 249)] == [1, 1 - 249 / 250]
    assert [cifar.SCHEDULE[2].factor(e, 250) for e in (99, 100, 150, 200)] == [1, 0.1, 0.1**2, 0.1**3]
    assert cifar.options(["-g", "3", "--steps", "1,2,3"]).gtarget == 3.0
    with pytest.raises(SystemExit, match="give 1,2 or 2"):
        cifar.options(["--steps", "2,1"])
    with pytest.raises(SystemExit, match="--teacher-weights"):
        imagenet.options([])


def read(folder):
    report = json.loads((folder / "report.json").read_text())
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>") and "data:image/png;base64," in page
    assert report["verify"]["mismatches"] == 0 and not any(report["cpp_mismatches"].values()) and report["cpp_mismatches"]
    return report


def test_cifar_smoke_and_resume(recipe, tmp_path):
    module = recipe("fracbnn_cifar10")
    first = module.main(["--smoke", f"--out={tmp_path}"])
    report = read(tmp_path)
    assert report["accuracy"] == first["accuracy"] and len(first["accuracy"]) == 2
    assert list(report["training"]) == ["step 1, real weights", "step 2, binary weights"]
    assert all(s["images_per_second"] > 0 for s in report["training"].values()) and 1 <= report["activation_bits"] <= 2
    assert {p.name for p in (tmp_path / "step1").iterdir()} >= {
        "last.safetensors",
        "best.safetensors",
        "best.json",
        "log.csv",
        "tensorboard",
    }
    assert sum(first["seconds"].values()) < 180

    weights = (tmp_path / "step2" / "best.safetensors").read_bytes()
    again = module.main(["--smoke", "--resume", f"--out={tmp_path}"])
    assert again["training"] == first["training"] and again["accuracy"] == first["accuracy"]  # nothing was trained anew
    assert (tmp_path / "step2" / "best.safetensors").read_bytes() == weights


def test_imagenet_smoke(recipe, tmp_path):
    result = recipe("fracbnn_imagenet").main(["--smoke", f"--out={tmp_path}"])
    report = read(tmp_path)
    assert report["images"] == {"train": 48, "test": 16} and report["unreadable"] == {}
    assert list(report["training"]) == ["step 1, real weights", "step 2, binary weights"]
    assert sum(result["seconds"].values()) < 180


@pytest.mark.slow
def test_two_processes(root, tmp_path):
    """The whole recipe under the launcher: both train, one converts and reports."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
    command = [*launch, str(root / "recipes/fracbnn_cifar10.py"), "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path)["images"] == {"train": 96, "test": 40} and done.stdout.count("report:") == 1


@pytest.mark.slow
def test_three_steps_and_binary_from_the_start(recipe, tmp_path):
    """Steps 1 and 2 leave the gates open; step 3 trains them."""
    cifar = recipe("fracbnn_cifar10")
    three = cifar.main(["--smoke", "--steps=1,2,3", f"--out={tmp_path / 'three'}"])
    assert list(three["training"])[-1] == "step 3, gated" and three["activation_bits"] < 2
    one = cifar.main(["--smoke", "--steps=2", "--fixed-point=authors", f"--out={tmp_path / 'one'}"])
    assert list(one["training"]) == ["step 2, binary weights"]
    labels = recipe("fracbnn_imagenet").main(["--smoke", "--labels", "--steps=2", f"--out={tmp_path / 'labels'}"])
    assert labels["verify"]["mismatches"] == 0
