"""The benchmark in a tiny form: every section runs and reports, pages come from the report alone, and exponents are right."""

import json

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_path(root, monkeypatch):
    """As when the recipe runs as a script: its own modules lie beside it."""
    monkeypatch.syspath_prepend(root / "recipes")


def test_networks_and_imports(recipe, tmp_path):
    benchmark = recipe("benchmark")
    words = ["--only=inference,conversion,csim,peers", "--networks=fracbnn_digits", "--quick", f"--out={tmp_path}"]
    report = benchmark.main(words)
    (row,) = report["networks"]
    assert {"float", "fake-quantized", "run, native", "run, portable", "run, torch", "csim, fast"} <= set(row["images_per_second"])
    assert all(v > 0 for v in row["images_per_second"].values()) and all(v >= 1 for v in row["spread"].values())
    assert row["memory_peak"] >= row["memory_convert"] >= row["memory_start"] > 0
    assert set(row["notes"]) == {"qonnx", "onnxruntime"}
    assert row["notes"]["onnxruntime"].startswith(("absent: ", "does not run it: "))  # one bit has no QCDQ form
    assert json.loads((tmp_path / "report.json").read_text())["networks"] == json.loads(json.dumps(report["networks"]))
    text = (tmp_path / "report.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>") and text.count("data:image/png;base64,") == 1
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")

    docs = tmp_path / "docs"
    docs.mkdir()
    module = benchmark.page
    for before in ("", "stale"):
        (docs / "performance.md").write_text(f"# Ours\n{module.BEGIN}{before}{module.END}\nAfter\n", encoding="utf-8")
        module.into_docs(report, docs)
        shown = (docs / "performance.md").read_text(encoding="utf-8")
        assert shown.startswith("# Ours\n") and shown.endswith(f"{module.END}\nAfter\n") and "stale" not in shown
        assert "### Targets" in shown and "| fracbnn_digits |" in shown and "(performance.png)" in shown
    (docs / "performance.md").write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="has lost the marks"):
        module.into_docs(report, docs)


def test_the_page_has_its_marks(recipe, root):
    page = recipe("benchmark").page
    text = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.index(page.BEGIN) < text.index(page.END)


def test_unknown_names(recipe):
    benchmark = recipe("benchmark")
    with pytest.raises(SystemExit, match="--only speed: choose from training, inference"):
        benchmark.main(["--only=speed"])
    with pytest.raises(SystemExit, match="no network 'lenet' to measure; there are fracbnn_digits"):
        benchmark.main(["--only=csim", "--networks=lenet"])


def test_exponents(recipe):
    """Exact powers; the slope of scattered points as numpy fits it, its error as the covariance says."""
    exponent = recipe("_size_speed").exponent
    assert exponent([1, 2, 4], [3, 12, 48]) == (pytest.approx(2, abs=1e-12), pytest.approx(0, abs=1e-12))  # logarithms round
    assert exponent([1, 2], [1, 8])[1] == 0.0
    sizes, seconds = np.array([1.0, 2, 4, 8, 16]), np.array([1.0, 2.3, 3.7, 9.1, 15.0])
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(seconds), 1, cov=True)
    assert exponent(list(sizes), list(seconds)) == pytest.approx((slope, covariance[0, 0] ** 0.5), rel=1e-9)  # two least-squares solvers


def test_sizes(recipe, tmp_path):
    size = recipe("_size_speed")
    size.SHAPE, size.QUICK = (3, 4, 4), {"width": (2, 4), "batch": (1, 2)}
    size.BASE.update(width=2, depth=1, batch=1)
    rows = size.measure(tmp_path, 1, quick=True)
    assert [(r["axis"], r["way"]) for r in rows] == [
        ("width", "convert"), ("width", "run"), ("width", "training step"), ("width", "csim"), ("batch", "run"), ("batch", "training step"),
    ]  # fmt: skip
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in rows)


def test_targets(recipe):
    page = recipe("_speed_page")
    big = {"network": "big_imagenet", "images_per_second": {"fake-quantized": 4.0, "run, native": 16.0, "run, torch": 5.0}}
    row = {
        "network": "cnv_1bit", "images_per_second": {"fake-quantized": 400.0, "run, native": 8000.0, "csim, fast": 250.0},
        "compile_seconds": 3.0, "convert_seconds": 6.0, "export_seconds": 2.0, "memory_export": 900.0, "weights_mb": 6.0,
    }  # fmt: skip
    training = {"network": "mb", "device": "cpu", "layout": "NCHW", "over": "float", "ratio": 1.3, "target": 1.25}
    found = {t["what"]: (t["measured"], t["reached"]) for t in page.targets({"networks": [row, big], "training": [training]})}
    assert found == {
        "cnv_1bit: ql.run, one image and core": ("0.125 ms", True),
        "big_imagenet: run, native over fake-quantized": ("4.00", True),
        "big_imagenet: run, torch over fake-quantized": ("1.25", False),
        "cnv_1bit: compilation of csim": ("3.00 s", True),
        "cnv_1bit: csim, one image": ("4.00 ms", True),
        "slowest conversion (cnv_1bit)": ("6.00 s", False),
        "slowest export (cnv_1bit)": ("2.00 s", True),
        "slowest compilation (cnv_1bit)": ("3.00 s", True),
        "peak memory over 2 x weights + 1 GB, the most (cnv_1bit)": ("0.889", True),
        "training step of mb, NCHW, over float": ("1.30", False),
    }
    assert [page.number(v) for v in (0.0, 0.00125, 0.125, 1.25, 12.5, 1250.0)] == ["0", "0.00125", "0.125", "1.25", "12.5", "1,250"]


def test_a_float_twin_and_peers(recipe, tmp_path):
    """The float network gives other numbers than the quantized one; peers that are installed give the model's."""
    speed = recipe("_network_speed")
    torch.manual_seed(0)
    model = speed.powers()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)
        twin = speed.floats(model, (3, 16, 16))
        assert twin is not None and not torch.equal(twin(x), wanted) and torch.equal(model(x), wanted)
        # qonnx: scales are powers of two, so every float32 sum is exact; onnxruntime fuses quantizers into kernels that round otherwise
        for name, off in (("qonnx", 1e-7), ("onnxruntime", 0.02 * float(wanted.abs().max()))):
            try:
                function, _ = speed.PEERS[name](model, x, tmp_path)
            except ModuleNotFoundError:
                continue
            assert np.allclose(function(), wanted.numpy(), rtol=1e-6, atol=off)
