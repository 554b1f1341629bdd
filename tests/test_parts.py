"""The table of parts: looked up by every name people use, ordered by size, with figures of the data sheets."""

from __future__ import annotations

import pytest

from quantlib.parts import PARTS, RESOURCES, USABLE, Part, fields_of, names, part


@pytest.mark.parametrize("said", ["xczu3eg", "XCZU3EG", "xczu3eg-sbva484-1-e", "Ultra96-V2", "ultra96 v2", "Ultra96"])
def test_one_part_by_all_its_names(said: str) -> None:
    assert part(said).name == "xczu3eg"


def test_figures_of_the_data_sheets() -> None:
    # DS891 (Zynq UltraScale+) table of device resources: ZU3 has 70,560 LUT, 141,120 FF, 360 DSP, 216 block RAMs of 36 kbit, no UltraRAM.
    p = part("xczu3eg")
    assert (p.lut, p.ff, p.dsp, p.bram18, p.uram) == (70_560, 141_120, 360, 2 * 216, 0)
    # DS190 (Zynq-7000): Z-7020 has 53,200 LUT, 106,400 FF, 220 DSP, 140 block RAMs of 36 kbit.
    p = part("xc7z020")
    assert (p.lut, p.ff, p.dsp, p.bram18, p.uram) == (53_200, 106_400, 220, 2 * 140, 0)
    # DS891: ZU9EG has 274,080 LUT, 2,520 DSP, 912 block RAMs of 36 kbit.
    p = part("ZCU102")
    assert (p.name, p.lut, p.ff, p.dsp, p.bram18) == ("xczu9eg", 274_080, 548_160, 2_520, 2 * 912)


def test_every_name_is_unique_and_leads_back() -> None:
    said = [n for p in PARTS for n in (p.name, p.full_name, *p.boards)]
    assert len({s.lower() for s in said}) == len(said)
    assert all(part(n) is p for p in PARTS for n in (p.name, p.full_name, *p.boards))
    assert names() == [p.name for p in PARTS]


def test_the_table_runs_from_small_to_large_and_has_twice_as_many_flip_flops_as_lut() -> None:
    assert [p.lut for p in PARTS if p.uram == 0 and p.name.startswith("xczu")] == sorted(
        p.lut for p in PARTS if p.uram == 0 and p.name.startswith("xczu")
    )
    assert all(p.ff == 2 * p.lut for p in PARTS)  # two per LUT in every family listed


def test_another_speed_grade_is_kept() -> None:
    assert part("xczu3eg-sbva484-1-i") == Part(**{**part("xczu3eg").__dict__, "full_name": "xczu3eg-sbva484-1-i"})
    assert part("xc7z020clg484-2").full_name == "xc7z020clg484-2"
    assert part("xc7z020clg484-2").dsp == 220


@pytest.mark.parametrize(
    ("said", "offered"), [("xczu3ge", "xczu3eg"), ("ultra-96-v3", "xczu3eg"), ("ZCU 106", "xczu7ev"), ("xczu3egx", "xczu3eg")]
)
def test_unknown_names_offer_the_nearest(said: str, offered: str) -> None:
    with pytest.raises(LookupError, match=f"{said}.*{offered}"):
        part(said)


def test_a_part_of_ones_own() -> None:
    mine = Part("mine", "mine-1", (), 100, 200, 10, 20, 0, 50.0)
    assert part(mine) is mine
    assert mine.budget() == {"lut": 70, "ff": 140, "dsp": 9, "bram18": 18, "uram": 0}
    assert set(mine.budget()) == set(RESOURCES) == set(USABLE)
    assert fields_of(mine)["boards"] == []
    assert str(part("xczu3eg")) == "xczu3eg (Ultra96, Ultra96-V2)"
