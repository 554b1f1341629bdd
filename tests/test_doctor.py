"""The doctor: what it calls known-bad, that it needs only the standard library, and what it says when packages are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantlib import doctor
from quantlib.__main__ import main

GOOD: dict[str, str | None] = {
    "torch": "2.14.1+cu130", "torchvision": "0.29.2+cu130", "brevitas": "0.13.4",
    "numpy": "2.4.6", "scipy": "1.17.1", "safetensors": "0.8.0",
}  # fmt: skip


def test_a_good_set() -> None:
    assert doctor.judge(GOOD, (3, 11)) == []
    assert doctor.judge({**GOOD, "torch": "2.11.0+cpu", "torchvision": "0.26.0+cpu"}, (3, 12)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": None}, "torch is missing: pip install 'torch>=2.11,<2.15'"),
        ({"torch": "2.10.1", "torchvision": "0.25.0"}, "torch 2.10.1: quantlib needs >=2.11,<2.15"),
        ({"torch": "2.15.0", "torchvision": "0.30.0"}, "torch 2.15.0: quantlib needs >=2.11,<2.15"),
        ({"brevitas": "0.13.5"}, "brevitas 0.13.5: quantlib needs ==0.13.4 .*internals"),
        ({"brevitas": "0.12.0"}, "brevitas 0.12.0: quantlib needs ==0.13.4"),
        ({"numpy": "1.24.0"}, "numpy 1.24.0: quantlib needs >=1.26"),
        ({"torchvision": "0.28.0+cu130"}, "built for another torch .*install torchvision 0.29"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cu130"}, "torchvision::nms"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "torchvision::nms"),
    ],
)
def test_known_bad(change: dict[str, str | None], said: str) -> None:
    import re

    bad = doctor.judge({**GOOD, **change}, (3, 11))
    assert any(re.search(said, b) for b in bad), bad


@pytest.mark.parametrize("python", [(3, 9), (3, 13)])
def test_python_versions(python: tuple[int, int]) -> None:
    assert any("supports 3.10 to 3.12" in b for b in doctor.judge(GOOD, python))


def test_the_ranges_are_those_of_the_project_file(root: Path) -> None:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    for package, _, lowest, below, _ in doctor.REQUIRED:
        exact = f'"{package}=={doctor._dotted(lowest)}"'
        ranged = f'"{package}>={doctor._dotted(lowest)}{",<" + doctor._dotted(below) if below else ""}"'
        assert exact in text or ranged in text, package


def test_versions_are_read_without_import() -> None:
    import torch

    assert doctor.version("torch") == torch.__version__
    assert doctor.version("no-such-package-here") is None
    assert doctor.release("2.14.1+cu130") == (2, 14, 1)


def test_it_loads_nothing_but_the_standard_library(root: Path) -> None:
    loaded = "[m for m in ('torch', 'numpy', 'brevitas', 'scipy') if m in sys.modules]"
    code = f"import sys; import quantlib.doctor, quantlib.__main__; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_without_any_package_it_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: None)
    monkeypatch.setattr(doctor, "_imports", lambda: {})
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = doctor.examine()
    text = doctor.report(found)
    assert "PROBLEM  torch is missing" in text and "apt install g++" in text and "none on PATH" in text
    assert len(found["problems"]) == len(doctor.REQUIRED)


def test_a_package_that_is_there_but_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_imports", lambda: {"torch": "ok", "torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    )
    assert any("`import torchvision` fails: RuntimeError: operator torchvision::nms" in p for p in doctor.examine()["problems"])


def test_command_line_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if found["problems"] else 0)
    assert found["packages"]["brevitas"] == "0.13.4"
    assert found["imports"]["torch"] == "ok"
    assert found["cpu"]["cores"] >= 1
    with pytest.raises(SystemExit):
        main(["no such command"])


def test_settings_that_change_what_runs_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_imports", lambda: {})
    monkeypatch.setenv("QUANTLIB_ENGINE", "portable")
    assert "QUANTLIB_ENGINE=portable" in doctor.report(doctor.examine())


def test_the_home_folder_is_not_spelt_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor._short(tmp_path / "bin" / "g++") == "~/bin/g++"
    assert doctor._short("/usr/bin/g++") == "/usr/bin/g++"


def test_shared_data_by_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTLIB_SHARED", str(tmp_path))
    assert doctor._shared()["folder"] is None
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "a.npz").write_bytes(b"")
    assert doctor._shared()["files"] == {"golden": 1, "data": 0}
