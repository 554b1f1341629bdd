"""FPGA parts and boards: what a network may use, and at which clock. Look one up by short name, full part name or board name."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, replace

RESOURCES = ("lut", "ff", "dsp", "bram18", "uram")

# Share of each resource a design may use before placement and routing usually fail to close timing: a rule of thumb, from no datasheet.
USABLE = {"lut": 0.70, "ff": 0.70, "dsp": 0.90, "bram18": 0.90, "uram": 0.90}


@dataclass(frozen=True)
class Part:
    """One device: 6-input LUTs, flip-flops, DSP slices, 18 kbit block RAMs, 288 kbit UltraRAMs, and a clock in MHz.

    Source: AMD (Xilinx) product tables DS190 (Zynq-7000), DS891 (Zynq UltraScale+), DS889 (RFSoC), DS987 (Kria), DS962 to DS965 (Alveo),
    DS950 (Versal). Looked up again elsewhere: the DSP slices of xcvc1902 (AM004, device resources), LUTs, block RAMs and DSP slices of
    xc7z010 and xc7z020 (a reader's list); the other figures were typed from the tables and not compared with a tool.
    A block RAM of 36 kbit counts as two of 18. The vendor tool is given `full_name`; the clock is our default, not the vendor's limit.
    """

    name: str
    full_name: str
    boards: tuple[str, ...]
    lut: int
    ff: int
    dsp: int
    bram18: int
    uram: int
    clock_mhz: float

    @property
    def slice(self) -> str:
        """The DSP slice of the device's family, a name of `quantlib.packing.DSPS`."""
        return "dsp48e1" if self.name.startswith("xc7") else "dsp58" if self.name.startswith("xcv") else "dsp48e2"

    @property
    def uram_rom(self) -> bool:
        """Whether UltraRAM can hold constants: that of UltraScale+ starts as zeros (UG573), that of Versal can be initialised (AM007)."""
        return self.slice == "dsp58"

    def budget(self) -> dict[str, int]:
        """What a design may use: the device times USABLE, rounded down."""
        return {r: int(getattr(self, r) * USABLE[r]) for r in RESOURCES}

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.boards) or self.full_name})"


# From small to large, so that the first part that fits is the smallest one.
PARTS: tuple[Part, ...] = (
    Part("xc7z010", "xc7z010clg400-1", ("Zybo", "MicroZed 7010"), 17_600, 35_200, 80, 120, 0, 100.0),
    Part("xczu1cg", "xczu1cg-sbva484-1-e", ("ZUBoard 1CG",), 37_440, 74_880, 216, 216, 0, 200.0),
    Part("xczu2eg", "xczu2eg-sfvc784-1-e", (), 47_232, 94_464, 240, 300, 0, 200.0),
    Part("xc7z020", "xc7z020clg400-1", ("PYNQ-Z1", "PYNQ-Z2", "ZedBoard", "Zybo Z7-20"), 53_200, 106_400, 220, 280, 0, 100.0),
    Part("xczu3eg", "xczu3eg-sbva484-1-e", ("Ultra96", "Ultra96-V2"), 70_560, 141_120, 360, 432, 0, 200.0),
    Part("xczu4ev", "xczu4ev-sfvc784-1-e", (), 87_840, 175_680, 728, 256, 48, 200.0),
    Part("xck26", "xck26-sfvc784-2LV-c", ("KV260", "KR260", "Kria K26"), 117_120, 234_240, 1_248, 288, 64, 200.0),
    Part("xczu5ev", "xczu5ev-sfvc784-1-e", (), 117_120, 234_240, 1_248, 288, 64, 200.0),
    Part("xc7z045", "xc7z045ffg900-2", ("ZC706",), 218_600, 437_200, 900, 1_090, 0, 150.0),
    Part("xczu7ev", "xczu7ev-ffvc1156-2-e", ("ZCU104",), 230_400, 460_800, 1_728, 624, 96, 250.0),
    Part("xczu9eg", "xczu9eg-ffvb1156-2-e", ("ZCU102",), 274_080, 548_160, 2_520, 1_824, 0, 250.0),
    Part("xc7z100", "xc7z100ffg900-2", (), 277_400, 554_800, 2_020, 1_510, 0, 150.0),
    Part("xczu15eg", "xczu15eg-ffvb1156-2-e", (), 341_280, 682_560, 3_528, 1_488, 112, 250.0),
    Part("xczu28dr", "xczu28dr-ffvg1517-2-e", ("ZCU111", "RFSoC 2x2"), 425_280, 850_560, 4_272, 2_160, 80, 250.0),
    Part("xcu50", "xcu50-fsvh2104-2-e", ("Alveo U50",), 871_680, 1_743_360, 5_952, 2_688, 640, 250.0),
    Part("xcvc1902", "xcvc1902-vsva2197-2MP-e-S", ("VCK190",), 899_840, 1_799_680, 1_968, 1_934, 463, 250.0),
    Part("xcu200", "xcu200-fsgd2104-2-e", ("Alveo U200",), 1_182_240, 2_364_480, 6_840, 4_320, 960, 250.0),
    Part("xcu280", "xcu280-fsvh2892-2L-e", ("Alveo U280",), 1_303_680, 2_607_360, 9_024, 4_032, 960, 250.0),
    Part("xcu250", "xcu250-figd2104-2L-e", ("Alveo U250",), 1_728_000, 3_456_000, 12_288, 5_376, 1_280, 250.0),
)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def names() -> list[str]:
    return [p.name for p in PARTS]


def part(name: str | Part) -> Part:
    """The part called `name`: "xczu3eg", "xczu3eg-sbva484-1-e" or "Ultra96-V2" (case, spaces and dashes do not matter).

    A full name with another package or speed grade of a listed device is accepted and kept. Otherwise LookupError with the nearest names.
    """
    if isinstance(name, Part):
        return name
    wanted = _plain(name)
    table = {_plain(n): p for p in PARTS for n in (p.name, p.full_name, *p.boards)}
    if wanted in table:
        return table[wanted]
    for p in PARTS:
        if re.fullmatch(p.name + r"-?[a-z]{3,4}\d{3,4}-\d[a-z]*(-[a-z])*", name.strip().lower()):
            return replace(p, full_name=name.strip())
    near = difflib.get_close_matches(wanted, table, n=3, cutoff=0.5)
    offer = ", ".join(dict.fromkeys(table[n].name for n in near)) or ", ".join(names())
    raise LookupError(f"no part or board is called {name!r}; nearest: {offer} (all: {', '.join(names())})")


def fields_of(p: Part) -> dict[str, object]:
    """The row of the table as plain values, for JSON."""
    return {**asdict(p), "boards": list(p.boards)}
