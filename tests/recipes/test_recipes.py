"""The recipes in a tiny form: they run, agree with themselves, and write whole reports."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("name", ["quickstart", "evaluate", "benchmark"])
def test_help(root, name):
    done = subprocess.run([sys.executable, root / "recipes" / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout


TINY = ["--epochs=4", "--train-images=400", "--test-images=60", "--cpp-images=10"]


def test_quickstart(recipe, tmp_path):
    result = recipe("quickstart").main([*TINY, f"--out={tmp_path}"])
    assert result["verify"]["ok"] and result["verify"]["mismatches"] == 0
    assert set(result["cpp_mismatches"].values()) == {0}
    assert result["accuracy"]["float"] > 0.3 and len(result["curve"]) == 4
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["accuracy"] == result["accuracy"] and np.array(written["confusion"]).sum() == 10
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>") and page.count("data:image/png;base64,") == 3
    assert not {"http:", "https:"} & set(page.split('"'))
    assert not list(tmp_path.glob(".report*"))


def test_quickstart_is_reproducible(recipe, tmp_path):
    quickstart = recipe("quickstart")
    first, second = (quickstart.main([*TINY, f"--out={tmp_path / name}"]) for name in "ab")
    assert [row["loss"] for row in first["curve"]] == [row["loss"] for row in second["curve"]]
    assert first["accuracy"] == second["accuracy"]


@pytest.mark.slow
def test_quickstart_in_full(recipe, tmp_path):
    result = recipe("quickstart").main([f"--out={tmp_path}"])
    assert min(result["accuracy"].values()) >= 0.95 and result["images"]["cpp"] >= 100
    assert sum(result["seconds"].values()) < 240


def test_evaluate_on_a_checkpoint(recipe, tmp_path):
    import zoo

    torch.save(zoo.get("fracbnn_digits").state_dict(), tmp_path / "w.pt")
    arguments = [
        "fracbnn_digits",
        f"--checkpoint={tmp_path / 'w.pt'}",
        "--images=20",
        "--cpp-images=5",
        "--verify-images=4",
        f"--out={tmp_path}",
    ]
    result = recipe("evaluate").main(arguments)
    assert result["accuracy"]["float"] == result["accuracy"]["integer"]
    assert result["verify"]["mismatches"] == 0 and result["cpp_mismatches"] == 0 and result["cpp_images"] == 5
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 20


def test_evaluate_says_why_a_network_has_no_integers(recipe, tmp_path):
    result = recipe("evaluate").main(["fracbnn_digits", "--option=fixed_point=None", "--images=5", f"--out={tmp_path}"])
    assert "FixedPoint" in result["not_converted"] and set(result["accuracy"]) == {"float"}


def test_evaluate_reads_options(recipe):
    options = recipe("evaluate").network_options(("fixed_point=12,6", "num_classes=7"))
    assert options["num_classes"] == 7 and (options["fixed_point"].bits, options["fixed_point"].fraction) == (12, 6)
    assert recipe("evaluate").network_options(("fixed_point=authors",)) == {"fixed_point": "authors"}
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        recipe("evaluate").network_options(("real_weights",))


@pytest.mark.slow
def test_published_accelerator_through_cpp(recipe, shared, tmp_path):
    """All 846 images: the compiled C++ gives the published accelerator's accuracy, and no integer differs from ql.run."""
    arguments = [
        "fracbnn_cifar10", f"--checkpoint={shared / 'data/fracbnn_cifar10_authors.npz'}",
        f"--data={shared / 'data/cifar10_test_lossless_846.npz'}", "--option=fixed_point=authors", "--cpp-images=0", f"--out={tmp_path}",
    ]  # fmt: skip
    result = recipe("evaluate").main(arguments)
    assert result["cpp_images"] == 846 and result["cpp_mismatches"] == 0 and result["verify"]["mismatches"] == 0
    assert {round(100 * v, 2) for v in result["accuracy"].values()} == {88.06}
