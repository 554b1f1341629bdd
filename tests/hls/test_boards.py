"""The scripts for the vendor's tools, run by a Tcl interpreter in which the tools' commands are stand-ins that know cells and pins."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quantlib as ql
from quantlib.hls import boards, project
from quantlib.parts import PARTS
from quantlib.schedule import Folding

tkinter = pytest.importorskip("tkinter", reason="the scripts run in the Tcl interpreter of tkinter")

# What a cell has: "i" input pins, "o" output pins, "m" and "s" master and slave interfaces. Manuals: PG201, PG082, PG164, PG247, PG021.
PINS: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "zynq_ultra_ps_e": lambda c: {
        "pl_clk0": "o", "pl_resetn0": "o", "pl_ps_irq0": "i", "M_AXI_HPM0_FPD": "m", "maxihpm0_fpd_aclk": "i", "S_AXI_HP0_FPD": "s",
        "saxihp0_fpd_aclk": "i"},
    "processing_system7": lambda c: {
        "FCLK_CLK0": "o", "FCLK_RESET0_N": "o", "IRQ_F2P": "i", "M_AXI_GP0": "m", "M_AXI_GP0_ACLK": "i", "S_AXI_HP0": "s",
        "S_AXI_HP0_ACLK": "i"},
    "proc_sys_reset": lambda c: {
        "slowest_sync_clk": "i", "ext_reset_in": "i", "peripheral_aresetn": "o", "interconnect_aresetn": "o"},
    "smartconnect": lambda c: {
        "aclk": "i", "aresetn": "i", **{f"S{k:02}_AXI": "s" for k in range(int(c["NUM_SI"]))},
        **{f"M{k:02}_AXI": "m" for k in range(int(c["NUM_MI"]))}},
    "axi_dma": lambda c: {
        "s_axi_lite_aclk": "i", "axi_resetn": "i", "S_AXI_LITE": "s", "m_axi_s2mm_aclk": "i", "M_AXI_S2MM": "m", "S_AXIS_S2MM": "s",
        "s2mm_introut": "o",
        **({"m_axi_mm2s_aclk": "i", "M_AXI_MM2S": "m", "M_AXIS_MM2S": "m", "mm2s_introut": "o"} if c["c_include_mm2s"] == "1" else {})},
    "xlconcat": lambda c: {"dout": "o", **{f"In{k}": "i" for k in range(int(c["NUM_PORTS"]))}},
}  # fmt: skip


class Vivado:
    """Cells, their configuration, what was connected, and which other commands were called."""

    def __init__(self, network: dict[str, str]) -> None:
        self.tcl = tkinter.Tcl()
        self.pins = {**PINS, **dict.fromkeys(("top_memory", "top_axis", "layerwise_top"), lambda c: network)}
        self.cells: dict[str, str] = {}
        self.config: dict[str, dict[str, str]] = {}
        self.driven: dict[str, str] = {}
        self.buses: list[tuple[str, str]] = []
        self.calls: list[tuple[str, ...]] = []
        self.properties: dict[str, str] = {}
        self.code: int | None = None
        own = {"create_bd_cell": self.create, "set_property": self.property, "connect_bd_net": self.net, "connect_bd_intf_net": self.bus,
               "get_bd_cells": self.cell, "get_bd_pins": self.pin, "get_bd_intf_pins": self.interface, "exit": self.exit,
               "get_property": lambda *a: "100%"}  # fmt: skip
        other = """create_project update_ip_catalog create_bd_design apply_bd_automation assign_bd_address validate_bd_design save_bd_design
            make_wrapper get_files current_project current_fileset launch_runs wait_on_run get_runs open_run report_utilization
            report_timing_summary open_project add_files set_top open_solution set_part create_clock csim_design csynth_design cosim_design
            export_design puts"""
        for name, do in own.items():
            self.tcl.createcommand(name, do)
        for name in other.split():
            self.tcl.createcommand(name, lambda *a, name=name: self.calls.append((name, *map(str, a))) or name)

    def run(self, script: Path) -> int | None:
        try:
            self.tcl.eval(f"source {{{script}}}")
        except tkinter.TclError as error:
            if self.code is None:
                raise AssertionError(f"{error}\n{self.tcl.eval('set ::errorInfo')}") from None
        return self.code

    def exit(self, code: str) -> None:
        self.code = int(code)
        raise SystemExit  # ends the script: tkinter hands it back as an error

    def create(self, *a: str) -> str:
        name, kind = str(a[-1]), str(a[a.index("-vlnv") + 1]).split(":")[2]
        assert name not in self.cells and kind in self.pins, (name, kind)
        self.cells[name], self.config[name] = kind, {}
        return name

    def property(self, *a: Any) -> None:
        words = [str(w) for w in a]
        pairs = self.tcl.splitlist(words[1]) if words[0] == "-dict" else words[:2]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if words[-1] in self.cells:
                self.config[words[-1]][str(key).removeprefix("CONFIG.")] = str(value)
            else:
                self.properties[str(key)] = str(value)

    def cell(self, name: str) -> str:
        assert name in self.cells, f"no cell {name}"
        return name

    def kind(self, path: str) -> str | None:
        cell, _, pin = path.rpartition("/")
        return self.pins[self.cells[self.cell(cell)]](self.config[cell]).get(pin)

    def pin(self, path: str) -> str:
        assert self.kind(path) in ("i", "o"), f"no pin {path}"
        return path

    def interface(self, *a: str) -> str:
        assert self.kind(a[-1]) in ("m", "s") or a[0] == "-quiet", f"no interface {a[-1]}"
        return a[-1] if self.kind(a[-1]) else ""

    def net(self, source: str, sink: str) -> None:
        # a clock may be named by any pin on it: follow it to what drives it
        source = self.driven.get(source, source)
        assert self.kind(source) == "o" and self.kind(sink) == "i" and sink not in self.driven, (source, sink)
        self.driven[sink] = source

    def bus(self, source: str, sink: str) -> None:
        assert (self.kind(source), self.kind(sink)) == ("m", "s"), (source, sink)
        self.buses.append((source, sink))

    def check(self) -> None:
        """Every input is driven, every interface is used once."""
        used = [end for pair in self.buses for end in pair]
        assert len(used) == len(set(used))
        for name, kind in self.cells.items():
            for pin, role in self.pins[kind](self.config[name]).items():
                assert f"{name}/{pin}" in (self.driven if role == "i" else used) or role == "o", f"{name}/{pin} is not connected"


@pytest.fixture(scope="module")
def folders(nets: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, project.Project]:
    """A network with two outputs, exported for the boards' parts and for cards."""
    made = {}
    for part in ("xczu3eg-sbva484-1-e", "xc7z020clg400-1", "xczu7ev-ffvc1156-2-e", "xcu250-figd2104-2L-e", "xcu50-fsvh2104-2-e", "xck26"):
        graph, folding = nets.residual(1)
        made[part] = project.write(graph, tmp_path_factory.mktemp("boards") / part, folding, part=part, clock_ns=5.0)
        (made[part].folder / "build" / "vendor" / "solution" / "impl" / "ip").mkdir(parents=True)
    return made


def network_pins(made: project.Project, top: str) -> dict[str, str]:
    ports = ["in_r", *(f"out{k}" for k in range(len(made.net.outputs)))]
    streams = {p: "s" if p == "in_r" else "m" for p in ports} if top == "top_axis" else {}
    masters = len(made.net.feeds) + (0 if streams else len(ports))
    data = {**streams, **{f"m_axi_gmem{k}": "m" for k in range(masters)}}
    return {"ap_clk": "i", "ap_rst_n": "i", "interrupt": "o", "s_axi_control": "s", **data}


@pytest.mark.parametrize("top", ["top_memory", "top_axis"])
@pytest.mark.parametrize("board", boards.BOARDS, ids=lambda b: b.name)
def test_block_design_is_wired_on_every_board(
    folders: dict[str, project.Project], board: boards.Board, top: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = next(m for part, m in folders.items() if boards.board_of(part) is board)
    monkeypatch.setenv("TOP", top)
    vivado = Vivado(network_pins(made, top))
    out = made.folder / "build" / "vivado" / "network.runs" / "impl_1" / "network_wrapper.bit"
    hwh = made.folder / "build" / "vivado" / "network.gen" / "sources_1" / "bd" / "network" / "hw_handoff" / "network.hwh"
    for path in (out, hwh):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert vivado.run(made.folder / "bitstream.tcl") == 0
    vivado.check()
    assert {vivado.driven[k] for k in vivado.driven if k.endswith(("clk", "aclk", "ACLK"))} == {next(
        f"ps/{p}" for p in ("pl_clk0", "FCLK_CLK0") if vivado.kind(f"ps/{p}"))}  # fmt: skip
    assert vivado.properties["board_part"] == board.board_part
    assert [c[0] for c in vivado.calls if c[0] in ("assign_bd_address", "validate_bd_design", "save_bd_design")] == [
        "assign_bd_address", "validate_bd_design", "save_bd_design"]  # fmt: skip
    assert {p.name for p in (made.folder / "build").iterdir()} >= {"network.bit", "network.hwh"}
    clock = next(v for k, v in vivado.config["ps"].items() if k.endswith("FREQMHZ"))
    assert clock == "200"
    if top == "top_axis":  # the register holds the bytes of an image of any stream
        bits = int(vivado.config["axi_dma_0"]["c_sg_length_width"])
        assert 8 <= bits <= 26 and max(8 * p.bus_words for p in (made.net.input, *made.net.outputs)) < 2**bits


@pytest.mark.parametrize("top", ["top_memory", "top_axis"])
def test_weights_from_memory_have_master_ports(nets: ModuleType, tmp_path: Path, top: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, folding = nets.small()
    folding |= {"conv": Folding(memory="stream"), "fc": Folding(memory="stream")}
    made = project.write(graph, tmp_path / "p", folding, part="xc7z020-1", clock_ns=10.0)
    for path in ("vendor/solution/impl/ip/x", "vivado/network.runs/impl_1/network_wrapper.bit"):
        (made.folder / "build" / path).parent.mkdir(parents=True)
        (made.folder / "build" / path).touch()
    monkeypatch.setenv("TOP", top)
    vivado = Vivado(network_pins(made, top))
    assert vivado.run(made.folder / "bitstream.tcl") == 0
    vivado.check()
    assert sum("m_axi_gmem" in source for source, _ in vivado.buses) == (4 if top == "top_memory" else 2)
    top_cpp = (made.folder / "src" / "top.cpp").read_text()
    bundles = {name: re.findall(r"m_axi port = (\w+) .*bundle = gmem(\d+)", part) for name, part in zip(
        ("top_axis", "top_memory"), top_cpp.split("void top_memory"), strict=True)}  # fmt: skip
    assert bundles["top_axis"] == [("weights0", "0"), ("weights1", "1")]
    assert bundles["top_memory"] == [("in", "0"), ("out0", "1"), ("weights0", "2"), ("weights1", "3")]
    card = project.write(graph, tmp_path / "card", folding, part="xcu250-figd2104-2L-e")
    assert "sp=top_memory_1.weights1:DDR[0]" in (card.folder / "kernel.cfg").read_text()


@pytest.mark.parametrize("part", ["xczu3eg", "xc7z020"])
def test_the_layer_by_layer_engine_has_a_block_design(nets: ModuleType, tmp_path: Path, part: str) -> None:
    made = ql.layerwise.export(nets.small()[0], tmp_path / "p", part)
    for path in ("vendor/solution/impl/ip/x", "vivado/network.runs/impl_1/network_wrapper.bit"):
        (made.folder / "build" / path).parent.mkdir(parents=True)
        (made.folder / "build" / path).touch()
    bundles = re.findall(r"m_axi port = \w+ .*bundle = (gmem\d)", (made.folder / "src" / "engine.cpp").read_text())
    pins = {"ap_clk": "i", "ap_rst_n": "i", "interrupt": "o", "s_axi_control": "s", **{f"m_axi_{b}": "m" for b in bundles}}
    vivado = Vivado(pins)
    assert vivado.run(made.folder / "bitstream.tcl") == 0
    vivado.check()
    assert {source for source, _ in vivado.buses} >= {f"layerwise_top_0/m_axi_gmem{k}" for k in range(6)}
    told = subprocess.run(["make", "-n", "bitstream"], cwd=made.folder, capture_output=True, text=True, check=True).stdout
    assert told.split() == "vivado -mode batch -source bitstream.tcl".split()


def test_make_calls_the_tools_of_the_part(folders: dict[str, project.Project]) -> None:
    def said(part: str, *arguments: str) -> str:
        return subprocess.run(["make", "-n", *arguments], cwd=folders[part].folder, capture_output=True, text=True, check=True).stdout

    assert said("xczu7ev-ffvc1156-2-e", "bitstream").split() == "vivado -mode batch -source bitstream.tcl".split()
    lines = said("xcu50-fsvh2104-2-e", "bitstream").splitlines()
    assert lines == ["vitis_hls -f kernel.tcl", "v++ --link --target hw --config kernel.cfg build/top_memory.xo -o build/network.xclbin"]
    assert said("xck26", "hls", "HLS=vitis-run --mode hls --tcl").strip() == "vitis-run --mode hls --tcl project.tcl"


def test_the_model_finds_what_is_not_connected(folders: dict[str, project.Project], tmp_path: Path) -> None:
    made = folders["xczu3eg-sbva484-1-e"]
    text = (made.folder / "bitstream.tcl").read_text().replace("set HERE [", f"set HERE {{{made.folder}}}; set unused [")
    damages = {
        "wire clock_and_reset/peripheral_aresetn ${TOP}_0/ap_rst_n\n": "top_memory_0/ap_rst_n is not connected",
        "bus memory/M00_AXI ps/$HP\n": "ps/S_AXI_HP0_FPD is not connected|memory/M00_AXI is not connected",
        "wire interrupts/dout ps/$IRQ\n": "ps/pl_ps_irq0 is not connected",
    }
    for line, message in damages.items():
        assert line in text
        (tmp_path / "broken.tcl").write_text(text.replace(line, ""))
        vivado = Vivado(network_pins(made, "top_memory"))
        vivado.run(tmp_path / "broken.tcl")
        with pytest.raises(AssertionError, match=message):
            vivado.check()
    (tmp_path / "broken.tcl").write_text(text.replace("interconnect memory", "interconect memory"))
    with pytest.raises(AssertionError, match="interconect"):
        Vivado(network_pins(made, "top_memory")).run(tmp_path / "broken.tcl")


def test_what_is_missing_is_said(folders: dict[str, project.Project], monkeypatch: pytest.MonkeyPatch) -> None:
    made = folders["xck26"]  # no board with this part is in the table
    for value, message in (("", "choose one of Ultra96-V2, PYNQ-Z2, ZCU104"), ("Ultra97", "BOARD=Ultra97: choose one of")):
        if value:
            monkeypatch.setenv("BOARD", value)
        vivado = Vivado(network_pins(made, "top_memory"))
        assert vivado.run(made.folder / "bitstream.tcl") == 1
        assert message in str(vivado.calls)
    monkeypatch.setenv("BOARD", "ZCU104")
    monkeypatch.setenv("TOP", "top")
    vivado = Vivado(network_pins(made, "top_memory"))
    assert vivado.run(made.folder / "bitstream.tcl") == 1 and "choose top_memory or top_axis" in str(vivado.calls)


@pytest.mark.parametrize("top", ["top_memory", "top_axis"])
def test_synthesis_script(folders: dict[str, project.Project], top: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = folders["xc7z020clg400-1"]
    monkeypatch.setenv("TOP", top)
    monkeypatch.chdir(made.folder)  # the script changes the folder
    tool = Vivado({})
    tool.tcl.createcommand("cd", lambda path: None)
    assert tool.run(made.folder / "project.tcl") == 0
    calls = {c[0]: c[1:] for c in tool.calls}
    assert calls["set_top"] == (top,) and calls["set_part"] == ("xc7z020clg400-1",) and calls["create_clock"] == ("-period", "5")
    order = [c[0] for c in tool.calls]
    assert order.index("open_project") < order.index("add_files") < order.index("open_solution") < order.index("csim_design")
    assert order.index("csim_design") < order.index("csynth_design") < order.index("export_design")
    tool.tcl.createcommand("csim_design", lambda *a: 1 / 0)
    assert tool.run(made.folder / "project.tcl") == 1  # a failed test bench is a failed run


def test_cards_take_the_kernel_flow(folders: dict[str, project.Project]) -> None:
    for part, memory in (("xcu250-figd2104-2L-e", "DDR[0]"), ("xcu50-fsvh2104-2-e", "HBM[0]")):
        made = folders[part]
        assert not (made.folder / "bitstream.tcl").exists()
        tool = Vivado({})
        tool.tcl.createcommand("cd", lambda path: None)
        assert tool.run(made.folder / "kernel.tcl") == 0
        calls = {c[0]: c[1:] for c in tool.calls}
        assert "vitis" in calls["open_solution"] and calls["set_part"] == (part,)
        assert calls["export_design"] == ("-format", "xo", "-output", f"{made.folder}/build/top_memory.xo")
        config = (made.folder / "kernel.cfg").read_text()
        ports = re.findall(r"^sp=top_memory_1\.(\w+):(.*)$", config, re.M)
        assert ports == [(p, memory) for p in ("in", *(f"out{k}" for k in range(len(made.net.outputs))))]
        parameters = re.search(r"void top_memory\((.*?)\)", (made.folder / "src" / "top.hpp").read_text(), re.S)
        assert parameters and re.findall(r"\* (\w+)", parameters.group(1)) == [p for p, _ in ports]
        assert re.search(r"^platform=xilinx_u\d+_\w+$", config, re.M) and "kernel_frequency=200" in config


def test_rows_name_listed_devices() -> None:
    known = {boards.device(p.full_name) for p in PARTS}
    assert {boards.device(b.part) for b in (*boards.BOARDS, *boards.CARDS)} <= known
    listed = {b for p in PARTS for b in p.boards}
    assert {b.name for b in (*boards.BOARDS, *boards.CARDS)} <= listed
    assert boards.board_of("xczu3eg") is boards.BOARDS[0] and boards.board_of("xck26") is None
