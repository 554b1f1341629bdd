"""The generated host program with the compiled top in the place of the board, behind PYNQ's overlay, registers, buffers and DMA engines."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import quantlib as ql
import zoo
from quantlib.evaluator import decode, encode
from quantlib.hls import project, writer
from quantlib.ir import Decode, Front


def program(made: project.Project) -> Any:
    """A fresh import of the driver.py of an exported project."""
    spec = importlib.util.spec_from_file_location("driver", made.folder / "driver.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the board


class Buffer(np.ndarray):
    """Memory as the processor sees it; the accelerator sees `device`, which only flush and invalidate bring together with it."""

    device: Any = None
    start = 0

    def __array_finalize__(self, obj: Any) -> None:
        self.device, self.start = getattr(obj, "device", None), getattr(obj, "start", 0)

    def _there(self) -> np.ndarray:
        offset = self.ctypes.data - self.start
        return self.device[offset : offset + self.nbytes]

    @property
    def device_address(self) -> int:
        return int(self._there().ctypes.data)

    def flush(self) -> None:
        self._there()[:] = np.asarray(self).reshape(-1).view(np.uint8)

    def invalidate(self) -> None:
        np.asarray(self).reshape(-1).view(np.uint8)[:] = self._there()


def allocate(shape: tuple[int, ...], dtype: Any) -> Buffer:
    buffer = np.full(shape, 0x5A5A5A5A5A5A5A5A, dtype=dtype).view(Buffer)
    buffer.device, buffer.start = np.full(buffer.nbytes, 0xA5, dtype=np.uint8), buffer.ctypes.data
    return buffer


class Ip:
    """The registers of a top; `work` runs when bit 0 of the control register is written."""

    def __init__(self, names: list[str], work: Any) -> None:
        self.names = dict(zip(["CTRL", *names], [0, *range(16, 16 + 8 * len(names), 8)], strict=True))
        self.values: dict[int, int] = {}
        self.done, self.work = False, work

    def __getitem__(self, name: str) -> int:
        return self.values[self.names[name]]

    def write(self, offset: int, value: int) -> None:
        assert offset in self.names.values() and 0 <= value < 1 << 32
        self.values[offset] = value
        if offset == 0 and value & 1:
            self.work()

    def read(self, offset: int) -> int:
        assert offset == 0
        done, self.done = self.done, False  # cleared by reading
        return 2 * done

    def entry(self, kind: str) -> dict[str, Any]:
        return {"type": f"xilinx.com:hls:{kind}:1.0", "registers": {k: {"address_offset": v} for k, v in self.names.items()}}


def compiled(made: project.Project) -> Any:
    """top_memory of the project behind a C function."""
    outs = [f"out{k}" for k in range(len(made.net.outputs))]
    fed = [f"weights{k}" for k in range(len(made.net.feeds))]
    wrapper = made.folder / "build" / "wrapper.cpp"
    wrapper.parent.mkdir(exist_ok=True)
    wrapper.write_text(
        f'#include "../src/top.cpp"\nextern "C" void run(const uint64_t* in, {", ".join(f"uint64_t* {o}" for o in [*outs, *fed])}, '
        f"unsigned images) {{ top_memory(in, {', '.join([*outs, *fed])}, images); }}\n"
    )
    target = wrapper.with_suffix(".so")
    if not target.exists():
        includes = [f"-I{made.folder / 'include'}", f"-I{made.folder / 'include' / 'shim'}"]
        flags = ["-std=c++14", "-O0", "-fPIC", "-shared", "-w", *includes]
        subprocess.run([project.compiler(), *flags, str(wrapper), "-o", str(target)], check=True)
    run = ctypes.CDLL(str(target)).run
    run.argtypes, run.restype = [ctypes.c_void_p] * (1 + len(outs) + len(fed)) + [ctypes.c_uint], None
    return run


def memory_overlay(made: project.Project, high: bool = True) -> SimpleNamespace:
    """An overlay with top_memory; with high=False the ports have one 32-bit register each."""
    ports = ["in_r", *(f"out{k}" for k in range(len(made.net.outputs))), *(f"weights{k}" for k in range(len(made.net.feeds)))]
    run = compiled(made)

    def work() -> None:
        run(*(ip[f"{p}_1"] | ip[f"{p}_2"] << 32 for p in ports), ip["images"])
        ip.done = True

    ip = Ip([*(f"{p}_{i}" for p in ports for i in (1, 2)), "images"] if high else [*ports, "images"], work)
    found = {"zynq": {"type": "xilinx.com:ip:zynq:1.0"}, "net/top_0": ip.entry("top_memory")}
    return SimpleNamespace(ip_dict=found, net=SimpleNamespace(top_0=ip))


class Channel:
    """One direction of a DMA engine: `idle` is false before the first transfer and while one is pending, as on the board."""

    def __init__(self, system: Any, sends: bool) -> None:
        self.system, self.sends, self.pending, self.buffer = system, sends, False, None

    @property
    def idle(self) -> bool:
        self.system.step()
        return self.buffer is not None and not self.pending

    def transfer(self, buffer: Buffer) -> None:
        assert not self.pending and isinstance(buffer, Buffer)
        self.buffer, self.pending = buffer, True
        if self.sends:
            buffer.flush()

    def wait(self) -> None:
        assert not self.pending and self.buffer is not None
        if not self.sends:
            self.buffer.invalidate()


class Streams:
    """An overlay with top_axis and a DMA engine per output. An output passes its next image only when it was fetched."""

    def __init__(self, made: project.Project, broken: bool = False) -> None:
        self.run, self.words = compiled(made), [p.bus_words for p in made.net.outputs]
        self.fed = [f"weights{k}" for k in range(len(made.net.feeds))]  # AXI4 masters beside the streams
        self.top_axis_0, self.left, self.broken = Ip(["images", *(f"{n}_{i}" for n in self.fed for i in (1, 2))], self.start), 0, broken
        self.queues: list[deque[np.ndarray]] = [deque() for _ in self.words]
        self.ip_dict = {"top_axis_0": self.top_axis_0.entry("top_axis")}
        self.channels = []
        for k in reversed(range(len(self.words))):
            self.ip_dict[f"axi_dma_{k}"] = {"type": "xilinx.com:ip:axi_dma:7.1", "registers": {}}
            dma = SimpleNamespace(sendchannel=Channel(self, True), recvchannel=Channel(self, False))
            setattr(self, f"axi_dma_{k}", dma)
            self.channels.insert(0, dma)

    def start(self) -> None:
        self.left = self.top_axis_0["images"]

    def step(self) -> None:
        send = self.channels[0].sendchannel
        if send.pending and self.left and not self.broken and not any(self.queues):
            outs = [np.zeros(w, np.uint64) for w in self.words]
            regions = [self.top_axis_0[f"{n}_1"] | self.top_axis_0[f"{n}_2"] << 32 for n in self.fed]
            self.run(send.buffer.device_address, *(o.ctypes.data for o in outs), *regions, 1)
            for queue, words in zip(self.queues, outs, strict=True):
                queue.append(words)
            send.pending = False
            self.left -= 1
        for queue, dma in zip(self.queues, self.channels, strict=True):
            if queue and dma.recvchannel.pending:
                dma.recvchannel.buffer._there()[:] = queue.popleft().view(np.uint8)
                dma.recvchannel.pending = False
        self.top_axis_0.done = not self.left and not any(self.queues)


# ---------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> project.Project:
    torch.manual_seed(0)
    graph = ql.convert(zoo.get("fracbnn_digits").eval(), (1, 8, 8))
    return ql.export(graph, tmp_path_factory.mktemp("driver") / "digits")


@pytest.fixture(scope="module")
def twice(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> project.Project:
    """Two results from three edges of 8, 16 and 32 bits, gains and biases of every shape, a float front end with a decreasing channel."""
    net = nets.Net(nets.Input((3, 6, 5), 0, 255))
    r = net.rng
    net.quantize("act", net.conv("conv", "x", 8), -2)
    net.add("fc", nets.Dense(r.integers(-9000, 9000, (10, 8 * 6 * 5))), "act")
    decodes = (
        Decode(("fc",), (r.normal(size=10) / 7,), r.normal(size=10), (10,)),
        Decode(("act", "conv"), (np.array(1 / 3), r.normal(size=(8, 1, 1))), np.array(0.1), (4, 60)),
    )
    front = Front(np.sort(r.normal(size=(3, 255)).astype(np.float32), 1), np.array([1, -1, 1]))
    graph = replace(net.graph("fc"), decodes=decodes, single_output=False, front=front)
    return project.write(graph, tmp_path_factory.mktemp("driver") / "twice", {})


def images(made: project.Project, count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, *made.graph.input.type.shape), dtype=np.uint8)


# ---------------------------------------------------------------- values


def test_digits_logits_equal_run_and_accuracy_is_right(
    digits: project.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, overlay, x = program(digits), memory_overlay(digits), images(digits, 21)
    want = ql.run(digits.graph, x).numpy()
    labels = want.argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    np.save(tmp_path / "images.npy", x)
    np.save(tmp_path / "labels.npy", labels)
    for name in ("net.bit", "net.hwh"):
        (tmp_path / name).touch()
    opened = []
    pynq = SimpleNamespace(Overlay=lambda path: opened.append(path) or overlay, allocate=allocate)
    monkeypatch.setitem(sys.modules, "pynq", pynq)
    arguments = [f"--bitstream={tmp_path / 'net.bit'}", "--batch=8"]
    files = [f"--{k}={tmp_path / k}.npy" for k in ("images", "labels")]
    assert driver.main([*arguments, *files, f"--out={tmp_path / 'logits.npy'}"]) == 0
    got = np.load(tmp_path / "logits.npy")
    assert got.dtype == np.float32 and np.array_equal(got, want)
    text = capsys.readouterr().out
    assert "top-1 76.19 % (16 of 21)" in text
    assert "21 images in batches of 8: " in text and "frames/s on the accelerator" in text
    assert driver.main(arguments) == 0
    assert capsys.readouterr().out == "output linear: every integer equal\n"
    assert opened == [str(tmp_path / "net.bit")] * 2
    monkeypatch.setattr(driver, "HERE", tmp_path)
    shutil.copytree(digits.folder / "golden", tmp_path / "golden")
    lines = (tmp_path / "golden" / "output0.txt").read_text().split()
    (tmp_path / "golden" / "output0.txt").write_text("\n".join([*lines[:-1], str(int(lines[-1]) + 1)]))
    assert driver.main(arguments) == 1
    assert "output linear: DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize("top", ["memory", "axis"])
def test_two_results_equal_run(twice: project.Project, top: str, tmp_path: Path) -> None:
    driver = program(twice)
    overlay: Any = Streams(twice) if top == "axis" else memory_overlay(twice)
    accelerator = driver.Accelerator(overlay, allocate, 4)
    x = np.random.default_rng(4).normal(size=(10, 3, 6, 5)).astype(np.float32)
    for given in (x, x.astype(np.float64), images(twice, 10)):  # floats through the front, and codes
        want = ql.run(twice.graph, given)
        got = driver.run(accelerator, given)
        assert [g.shape for g in got] == [(10, 10), (10, 4, 60)]
        assert all(np.array_equal(g, w.numpy()) for g, w in zip(got, want, strict=True))
    assert accelerator.seconds > 0
    path = driver.save(str(tmp_path / "logits.npy"), got)
    assert path.name == "logits.npz"
    with np.load(path) as file:
        assert all(np.array_equal(file[f"arr_{k}"], g) for k, g in enumerate(got))


def test_a_card_takes_its_binary_alone(digits: project.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = program(digits)
    monkeypatch.setitem(sys.modules, "pynq", SimpleNamespace(Overlay=lambda path: memory_overlay(digits), allocate=allocate))
    (tmp_path / "network.xclbin").touch()
    assert driver.open_board(str(tmp_path / "network.xclbin"), 2).batch == 2
    (tmp_path / "network.bit").touch()
    with pytest.raises(driver.DriverError, match="network.hwh is missing"):
        driver.open_board(str(tmp_path / "network.bit"), 2)


@pytest.mark.parametrize("top", ["memory", "axis"])
def test_weights_are_fed_from_memory(nets: ModuleType, top: str, tmp_path: Path) -> None:
    graph, folding = nets.small()
    made = project.write(
        graph, tmp_path / "p", {**folding, "conv": project.Folding(4, 3, "stream"), "fc": project.Folding(5, 16, "stream")}
    )
    driver = program(made)
    overlay: Any = Streams(made) if top == "axis" else memory_overlay(made)
    accelerator = driver.Accelerator(overlay, allocate, 2)
    x = images(made, 3)
    assert np.array_equal(driver.run(accelerator, x)[0], ql.run(graph, x).numpy())
    path = made.folder / "params" / "fc_weights.bin"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(driver.DriverError, match=r"fc_weights.bin holds 79 words of 64 bits, 80 were exported; copy params/ to the board"):
        driver.Accelerator(overlay, allocate, 2)


def test_packing_is_that_of_the_project_and_comes_back(twice: project.Project) -> None:
    driver, r = program(twice), np.random.default_rng(5)
    edges = [driver.INPUT, *driver.OUTPUTS]
    assert [e["container"] for e in edges] == ["uint8", "int32", "int8", "int16"]
    for edge, pin in zip(edges, (twice.net.input, *twice.net.outputs), strict=True):
        n = r.integers(pin.type.lo, pin.type.hi + 1, (3, *pin.type.shape))
        words = driver.pack(n, edge)
        assert words.shape == (3, pin.bus_words) == (3, driver.words_of(edge))
        flat = words.view(edge["container"])
        assert np.array_equal(flat[:, : pin.type.numel], writer.to_stream(n, pin.type))
        assert not flat[:, pin.type.numel :].any()
        assert np.array_equal(driver.unpack(words, edge), n)


def test_encoding_and_decoding_are_those_of_the_library(twice: project.Project) -> None:
    driver, graph, r = program(twice), twice.graph, np.random.default_rng(6)
    assert graph.front is not None
    x = r.normal(size=(5, 3, 6, 5)).astype(np.float32)
    x[0] = graph.front.thresholds[:, :30].reshape(3, 6, 5) * graph.front.sign[:, None, None]  # on the thresholds themselves
    x[1, 0, 0] = [np.inf, -np.inf, 0.0, -0.0, 1e-45]
    assert np.array_equal(driver.encode(x), encode(graph, x).numpy())
    for bound in (2, 2**30):  # small ones show the bias to its last bit
        edges = {o: torch.from_numpy(r.integers(-bound, bound, (7, *graph.by_name[o].type.shape))) for o in graph.outputs}
        got = driver.decode([edges[o].numpy() for o in graph.outputs])
        assert all(np.array_equal(g, w.numpy()) for g, w in zip(got, decode(graph, edges), strict=True))


def test_floats_on_the_grid_where_there_is_no_front(digits: project.Project) -> None:
    driver, x = program(digits), images(digits, 3)
    on = (x / 255).astype(np.float32)
    assert np.array_equal(driver.encode(on), x) and np.array_equal(driver.encode(on), encode(digits.graph, on).numpy())
    with pytest.raises(driver.DriverError, match=r"not scale \* code, code 0..255, scale 0.00392157"):
        driver.encode(on + np.float32(0.001))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x > 3, "dtype bool; expected uint8 or other integers .codes 0..255., or floats"),
        (lambda x: x.astype(complex), "dtype complex128"),
        (lambda x: x[0], r"shape \(3, 6, 5\); expected \(N, 3, 6, 5\); add the batch axis"),
        (lambda x: x.transpose(0, 2, 3, 1), r"shape \(2, 6, 5, 3\).*channels come first: images.transpose\(0, 3, 1, 2\)"),
        (lambda x: x[:, :2], r"shape \(2, 2, 6, 5\); expected \(N, 3, 6, 5\)$"),
        (lambda x: x[:0], "no image"),
        (lambda x: x.astype(np.int16) - 300, "codes are 0..255, got -300..-45"),
        (lambda x: x.astype(np.uint64) + 2**63, "codes are 0..255, got 9223372036854775808"),
        (lambda x: x * np.float32("nan"), "NaN"),
    ],
)
def test_images_that_do_not_fit(twice: project.Project, change: Any, message: str) -> None:
    driver = program(twice)
    x = np.arange(2 * 90).reshape(2, 3, 6, 5) % 256
    x[0, 0, 0, :2] = 0, 255
    with pytest.raises(driver.DriverError, match=message):
        driver.encode(change(x))


def test_command_line_errors(
    digits: project.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = program(digits)
    monkeypatch.setitem(sys.modules, "pynq", None)
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", images(digits, 4))
    np.save("short.npy", np.arange(3))
    np.save("far.npy", np.array([0, 1, 2, 10]))
    np.save("objects.npy", np.array([{}]))
    Path("text.npy").write_text("no array")

    def refused(*arguments: str) -> str:
        assert driver.main(["--bitstream", "net.bit", *arguments]) == 2
        return capsys.readouterr().err

    assert "net.bit is missing" in refused("--images", "images.npy")
    Path("net.bit").touch()
    assert "net.hwh is missing; copy the bitstream and the .hwh" in refused()
    Path("net.hwh").touch()
    assert "run this on the board, under its PYNQ image" in refused("--images", "images.npy")
    assert "absent.npy is no .npy file" in refused("--images", "absent.npy")
    assert "text.npy is no .npy file" in refused("--images", "text.npy")
    assert "objects.npy is no .npy file" in refused("--images", "objects.npy")
    assert "images of shape (3,); expected (N, 1, 8, 8)" in refused("--images", "short.npy")
    assert "shape (3,); expected integers of shape (4,)" in refused("--images", "images.npy", "--labels", "short.npy")
    assert "labels 0..10; the network's classes are 0..9" in refused("--images", "images.npy", "--labels", "far.npy")
    assert "--batch 0" in refused("--batch", "0")
    assert "--labels and --out need --images" in refused("--out", "x.npy")


def test_boards_that_do_not_fit(twice: project.Project) -> None:
    driver = program(twice)
    with pytest.raises(driver.DriverError, match="needs one IP top_memory or top_axis, it holds led"):
        driver.Accelerator(SimpleNamespace(ip_dict={"led": {"type": "xilinx.com:ip:axi_gpio:2.0"}}), allocate)
    streams = Streams(twice)
    del streams.ip_dict["axi_dma_2"]
    with pytest.raises(driver.DriverError, match="one AXI DMA per output, 3; the overlay holds axi_dma_0, axi_dma_1"):
        driver.Accelerator(streams, allocate)
    stuck = driver.Accelerator(Streams(twice, broken=True), allocate, 2, patience=0.05)
    with pytest.raises(driver.DriverError, match="DMA does not move for 0.05 s .control register 0x00."):
        driver.run(stuck, images(twice, 2))
    narrow = driver.Accelerator(memory_overlay(twice, high=False), allocate, 2)
    with pytest.raises(driver.DriverError, match=r"no register in.*_2; the .hwh names CTRL, in_r, out0"):
        driver.run(narrow, images(twice, 2))
