"""The host program with the compiled engine in the place of the board, behind PYNQ's overlay, registers and buffers."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import quantlib as ql
from quantlib.layerwise import Project

PORTS = ("program", "weights", "tables", "maps", "sides", "results")


@pytest.fixture(scope="module")
def made(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two outputs of different widths."""
    net = nets.Net(nets.Input((3, 6, 5), 0, 255))
    net.quantize("act", net.conv("conv", "x", 40), -2)
    net.add("fc", nets.Dense(net.rng.integers(-9, 9, (10, 40 * 6 * 5))), "act")
    return ql.layerwise.export(net.graph("fc", "act"), tmp_path_factory.mktemp("driver") / "p")


@pytest.fixture
def driver(made: Project) -> Iterator[Any]:
    """A fresh import of the project's driver.py, and of the host.py that it imports."""
    spec = importlib.util.spec_from_file_location("driver", made.folder / "driver.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("host")
    sys.path.remove(str(made.folder))


def overlay(board: ModuleType, made: Project) -> SimpleNamespace:
    library = made.library()

    def work() -> None:
        at = {p: ip[f"{p}_1"] | ip[f"{p}_2"] << 32 for p in PORTS}
        assert at["program"] == at["weights"] == at["tables"] and at["maps"] == at["sides"] == at["results"]
        library.lw_top(board.ctypes.c_void_p(at["program"]), board.ctypes.c_void_p(at["maps"]), ip["images"])
        ip.done = True

    ip = board.Ip([*(f"{p}_{i}" for p in PORTS for i in (1, 2)), "images"], work)
    found = {"zynq": {"type": "xilinx.com:ip:zynq:1.0"}, "layerwise_top_0": ip.entry("layerwise_top")}
    return SimpleNamespace(ip_dict=found, layerwise_top_0=ip)


def allocate(board: ModuleType) -> Any:
    """PYNQ's buffers are of any dtype; the stand-in fills new memory with rubbish."""

    def make(shape: tuple[int, ...], dtype: Any) -> Any:
        buffer = np.full(shape, 0x5A, dtype=dtype).view(board.Buffer)
        buffer.device, buffer.start = np.full(buffer.nbytes + 64, 0xA5, dtype=np.uint8), buffer.ctypes.data
        buffer.device = buffer.device[-buffer.device.ctypes.data % 64 :][: buffer.nbytes]
        return buffer

    return make


def test_images_give_the_logits_of_run(board: ModuleType, made: Project, driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    x = np.random.default_rng(3).integers(0, 256, (11, 3, 6, 5), dtype=np.uint8)
    engine = driver.Engine(overlay(board, made), allocate(board), 4)
    got, want = driver.host.run(engine, x), ql.run(made.graph, x)
    assert all(np.array_equal(g, w.numpy()) for g, w in zip(got, want, strict=True))
    assert engine.seconds > 0
    np.save(tmp_path / "images.npy", x)
    for name in ("net.bit", "net.hwh"):
        (tmp_path / name).touch()
    pynq = SimpleNamespace(Overlay=lambda path: overlay(board, made), allocate=allocate(board))
    monkeypatch.setitem(sys.modules, "pynq", pynq)
    arguments = [f"--bitstream={tmp_path / 'net.bit'}", "--batch=4"]
    assert driver.host.main([*arguments, f"--images={tmp_path / 'images.npy'}", f"--out={tmp_path / 'logits.npy'}"]) == 0
    with np.load(tmp_path / "logits.npz") as file:
        assert all(np.array_equal(file[f"arr_{k}"], w.numpy()) for k, w in enumerate(want))
    capsys.readouterr()
    assert driver.host.main(arguments) == 0
    assert capsys.readouterr().out == "output fc: every integer equal\noutput act: every integer equal\n"


def test_boards_and_files_that_do_not_fit(
    board: ModuleType, made: Project, driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(driver.host.DriverError, match="needs one IP layerwise_top, it holds led"):
        driver.Engine(SimpleNamespace(ip_dict={"led": {"type": "xilinx.com:ip:axi_gpio:2.0"}}), allocate(board))
    monkeypatch.setattr(driver, "HERE", tmp_path)
    with pytest.raises(driver.host.DriverError, match="has 0 bytes, .* belong to this project; copy it again"):
        driver.Engine(overlay(board, made), allocate(board))
    shutil.copy(made.folder / "driver.json", tmp_path / "memory.bin")
    with pytest.raises(driver.host.DriverError, match="belong to this project"):
        driver.Engine(overlay(board, made), allocate(board))
