"""Boards: the scripts that put an exported project on one, as text. No vendor tool ran where these were written."""

from __future__ import annotations

from dataclasses import dataclass

from quantlib.hls.netlist import Netlist, Pin
from quantlib.hls.network import template


@dataclass(frozen=True)
class Board:
    """A board with a processor. part and board_part as the board's files name them (Avnet, TUL and AMD board repositories); `ps` is the
    processor's IP: zynq_ultra_ps_e (PG201) or processing_system7 (PG082)."""

    name: str
    part: str
    board_part: str
    ps: str


@dataclass(frozen=True)
class Card:
    """An accelerator card of the kernel flow: its platform (DS962 to DS965, UG1120) and the memory its kernel's ports are put on."""

    name: str
    part: str
    platform: str
    memory: str


BOARDS = (
    Board("Ultra96-V2", "xczu3eg-sbva484-1-i", "avnet.com:ultra96v2:part0:1.2", "zynq_ultra_ps_e"),
    Board("PYNQ-Z2", "xc7z020clg400-1", "tul.com.tw:pynq-z2:part0:1.0", "processing_system7"),
    Board("ZCU104", "xczu7ev-ffvc1156-2-e", "xilinx.com:zcu104:part0:1.1", "zynq_ultra_ps_e"),
)
CARDS = (
    Card("Alveo U50", "xcu50-fsvh2104-2-e", "xilinx_u50_gen3x16_xdma_5_202210_1", "HBM[0]"),
    Card("Alveo U200", "xcu200-fsgd2104-2-e", "xilinx_u200_gen3x16_xdma_2_202110_1", "DDR[0]"),
    Card("Alveo U250", "xcu250-figd2104-2L-e", "xilinx_u250_gen3x16_xdma_4_1_202210_1", "DDR[0]"),
    Card("Alveo U280", "xcu280-fsvh2892-2L-e", "xilinx_u280_gen3x16_xdma_1_202211_1", "DDR[0]"),
)


def device(part: str) -> str:
    """xczu3eg-sbva484-1-e and xczu3eg-sbva484-1-i are one device; so are xc7z020clg400-1 and xc7z020-1."""
    return part.split("-")[0].split("clg")[0]


def board_of(part: str) -> Board | Card | None:
    """The first board or card with this device."""
    return next((b for b in (*BOARDS, *CARDS) if device(b.part) == device(part)), None)


def length_bits(net: Netlist) -> int:
    """Width of the length register of an AXI DMA that carries one image per transfer: 8 to 26 bits (PG021)."""
    pins: tuple[Pin, ...] = (net.input, *net.outputs)
    return min(26, max(8, max(8 * p.bus_words for p in pins).bit_length()))


def files(net: Netlist, part: str, clock_ns: float) -> dict[str, str | bytes]:
    """project.tcl for every part; bitstream.tcl where the part sits beside a processor, kernel.tcl and kernel.cfg for a card."""
    found = board_of(part)
    made: dict[str, str | bytes] = {"project.tcl": template("project.tcl", part=part, clock=f"{clock_ns:g}")}
    if isinstance(found, Card):
        ports = ["in", *(f"out{k}" for k in range(len(net.outputs))), *(f"weights{k}" for k in range(len(net.feeds)))]
        made["kernel.tcl"] = template("kernel.tcl", part=part, clock=f"{clock_ns:g}")
        made["kernel.cfg"] = template(
            "kernel.cfg", card=found.name, platform=found.platform, clock=f"{1000 / clock_ns:.0f}",
            ports="\n".join(f"sp=top_memory_1.{p}:{found.memory}" for p in ports),
        )  # fmt: skip
        return made
    masters, outputs = 1 + len(net.outputs) + len(net.feeds), len(net.outputs)
    return made | block_design(part, 1000 / clock_ns, ("top_memory", "top_axis"), masters, outputs, length_bits(net))


def block_design(
    part: str, clock_mhz: float, tops: tuple[str, ...], masters: int, outputs: int = 0, length: int = 8
) -> dict[str, str | bytes]:
    """bitstream.tcl: the processor of the part's board with one of `tops` and what is between them; the first, or $TOP.

    masters: AXI4 master ports gmem0, gmem1, ... of a top; outputs, length: streams of a top_axis and bits of their DMAs' length registers.
    """
    found = board_of(part)
    rows = "\n".join(f"    {{{b.name}}} {{{b.part} {b.board_part} {b.ps}}}" for b in BOARDS)
    text = template(
        "bitstream.tcl", board=found.name if isinstance(found, Board) else "", boards=rows, clock=f"{clock_mhz:g}", tops=" ".join(tops),
        masters=masters, outputs=outputs, length=length,
    )  # fmt: skip
    return {"bitstream.tcl": text}
