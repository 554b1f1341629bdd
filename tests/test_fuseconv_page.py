"""docs/fuseconv.md: every number of its tables against the published table, the cards or the code; its example runs and prints that."""

from __future__ import annotations

import csv
import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quantlib as ql
import zoo
from quantlib.fuse import gains
from zoo.fuseconv import FAMILIES, KINDS, TITLES

SIDES = (16, 32, 64, 128)
SHAPE = (3, 224, 224)
KIND = {"depthwise": "", "dense": "", **{suffix.removeprefix("_fuse_").replace("_hybrid", ", part"): suffix for suffix, f, _ in KINDS if f}}
RECORDED = {"MobileNetV1": "MobileNetV1", "MobileNetV2": "MobileNetV2", "MnasNetB1": "MnasNet-B1", "MobileNetV3Small": "MobileNetV3-Small",
            "MobileNetV3Large": "MobileNetV3-Large", "ResNet50": "ResNet-50"}  # fmt: skip


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "fuseconv.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_fuseconv_tables", root / "recipes" / "fuseconv_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[tuple[str, str, int, str], dict[str, str]]:
    """(title, suffix of our name, side, hardware) -> row of the published table."""
    suffix = {"baseline": "", **{s.removeprefix("_fuse_"): s for s, fuse, _ in KINDS if fuse}}
    with (shared / "golden" / "fuseconv_table.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["array_x"] == r["array_y"] and r["variant"] in suffix]
    return {(RECORDED[r["network"]], suffix[r["variant"]], int(r["array_x"]), r["hardware"]): r for r in rows}


def rows(page: str, head: str) -> list[list[str]]:
    """Cells of the rows below a header line that begins with `head`."""
    lines = page[page.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def name_of(title: str, suffix: str = "") -> str:
    return next(name for name, t in TITLES.items() if t == title) + suffix + "_imagenet"


def test_cycles_on_every_array(page, recorded):
    found = rows(page, "| network | layers | parameters | MAC ")
    assert len(found) == len(TITLES) * len(KINDS)
    for title, kind, parameters, macs, *cells in found:
        suffix = KIND[kind]
        card = zoo.card(name_of(title, suffix))
        assert (parameters, macs) == (f"{card.parameters:,}", f"{card.macs:,}")
        for side, cell in zip(SIDES, cells, strict=True):
            row, before = recorded[title, suffix, side, "FuSe"], recorded[title, "", side, "Systolic"]
            cycles = int(row["cycles"])
            assert (int(row["params"]), int(row["macs_total"])) == (card.parameters, card.macs)
            assert cell == (f"{cycles:,} ({int(before['cycles']) / cycles:.2f})" if suffix else f"{cycles:,}")


def test_published_figures_and_their_deviations(page, recorded):
    found = rows(page, "| network | layers | top-1 % pub.")
    assert len(found) == 25
    exact = near = 0
    for title, kind, top1, operations, rule, macs, published, ours, factor, speedup, difference in found:
        card = zoo.card(name_of(title, KIND[kind]))
        claimed = [claim.value for claim in card.claims]
        assert [float(v) for v in (top1, operations, published, factor)] == claimed
        assert (macs, ours) == (f"{card.macs / 1e6:.2f}", f"{card.parameters / 1e6:.4f}")
        assert int(card.parameters / 1e4) / 100 == claimed[2]  # truncated
        ratio = int(recorded[title, "", 64, "Systolic"]["cycles"]) / int(recorded[title, KIND[kind], 64, "FuSe"]["cycles"])
        assert speedup == f"{ratio:.3f}" and difference == f"{100 * (ratio / claimed[3] - 1):+.1f} %"
        exact += int(rule) == claimed[1]
        near += abs(float(difference.split()[0])) <= 1.1
        assert abs(int(rule) - claimed[1]) <= 1
    assert exact == 20 and near == 22


def test_what_is_said_in_short(page, recorded):
    plain = [int(recorded["MobileNetV2", s, 64, "Systolic"]["cycles"]) for s in ("", "_fuse_half", "_fuse_full")]
    assert "half layers is 1.09 times" in page and f"{plain[0] / plain[1]:.2f}" == "1.09"
    assert "full layers 0.57 times" in page and f"{plain[0] / plain[2]:.2f}" == "0.57"
    cards = {(t, s): zoo.card(name_of(t, s)) for t in list(TITLES.values())[:5] for s, _, _ in KINDS}
    lost = {k: round(cards[k[0], ""].claims[0].value - c.claims[0].value, 2) for k, c in cards.items()}
    assert (lost["MobileNetV2", "_fuse_half"], lost["MobileNetV3-Small", "_fuse_half"], lost["MobileNetV1", "_fuse_half"]) == (
        1.2,
        2.85,
        -1.4,
    )
    full = [v for (_, s), v in lost.items() if s == "_fuse_full"]
    assert (max(full), min(full)) == (0.8, -2.26)
    assert max(v for (_, s), v in lost.items() if s == "_fuse_half_hybrid") == 1.4
    assert max(v for (_, s), v in lost.items() if s == "_fuse_full_hybrid") == 0.7
    weights = {t: cards[t, "_fuse_full"].parameters / cards[t, ""].parameters for t in ("MobileNetV2", "MobileNetV3-Large")}
    assert [f"{w:.2f}" for w in weights.values()] == ["1.27", "1.93"]
    macs = [cards[t, "_fuse_full"].macs / cards[t, ""].macs for t, s in cards if not s]
    assert (f"{min(macs):.2f}", f"{max(macs):.2f}") == ("1.25", "1.94")
    for side in SIDES:  # half is the fastest, on all of them
        for title in TITLES.values():
            cycles = {s: int(recorded[title, s, side, "FuSe"]["cycles"]) for s, _, _ in KINDS}
            assert min(cycles, key=cycles.__getitem__) == "_fuse_half"
    parts = [
        int(recorded[t, "", 64, "FuSe"]["cycles"]) / int(recorded[t, s, 64, "FuSe"]["cycles"]) for t, s in cards if s.endswith("hybrid")
    ]
    assert (f"{min(parts):.1f}", f"{max(parts):.1f}") == ("1.6", "2.4")


def test_the_example_prints_what_the_page_shows(page, tmp_path, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    (shown,) = re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    runpy.run_path(str(tmp_path / "page.py"))
    assert capsys.readouterr().out.splitlines() == shown.splitlines()


def test_the_comparison_on_cifar10(page):
    """Accuracies are those of the cards; the rest follows from the networks."""
    found = rows(page, "| variant | top-1 % on 8,000 test images")
    before = 0
    for variant, top1, _, parameters, cycles, speedup in found:
        name = name_of("MobileNetV2", {"baseline": ""}.get(variant, f"_fuse_{variant}"))
        (measured,) = zoo.card(name).measured
        assert top1 == f"{measured.value:.2f}" and "--size 64 --width 0.35 --epochs 6 --images 6000" in measured.source
        model = zoo.get(name, num_classes=10, width=0.35)
        ours = ql.analysis.systolic_latency(model, (3, 64, 64), array="fuse").cycles
        before = before or ours
        assert parameters == f"{sum(p.numel() for p in model.parameters()):,}"
        assert (cycles, speedup) == (f"{ours:,}", f"{before / ours:.2f}")
    assert [row[0] for row in found] == ["baseline", "half", "full"]


def test_links_and_files_exist(page, root):
    named = re.findall(r"\]\(([^)#]+)\)", page) + [f"../{n}" for n in re.findall(r"`((?:recipes|tests)/[\w/]+\.py)`", page)]
    assert named and all((root / "docs" / link).exists() for link in named)


def test_the_command_prints_the_tables(tables, capsys, tmp_path, recorded):
    result = tables.main(["--families", "mobilenet_v3_small", "--arrays", "16,64", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for name, found in result["networks"].items():
        suffix = name.removeprefix("mobilenet_v3_small").removesuffix("_imagenet")
        for side in (16, 64):
            assert found["cycles"][side] == int(recorded["MobileNetV3-Small", suffix, side, "FuSe"]["cycles"])
        kinds = {k: int(recorded["MobileNetV3-Small", suffix, 64, "FuSe"][f"cycles_{k}"]) for k in ("pointwise", "depthwise", "other")}
        assert found["kinds"] == kinds and f"{found['cycles'][64]:,}" in out
    assert "MobileNetV3-Small, 64x64" in out and "16x16  64x64" in out and "by rule" in out
    assert (tmp_path / "latency.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "tables.json").is_file()
    for argv in (["--families", "vgg"], ["--show", "energy"]):
        with pytest.raises(SystemExit, match="give"):
            tables.main(argv)


def scores(page: str) -> dict[tuple[str, str], str]:
    """(name, bits) -> score as printed."""
    kinds = ("", "_fuse_half", "_fuse_full", "_fuse_half_hybrid", "_fuse_full_hybrid")
    return {
        (name_of(title, suffix), bits): value
        for title, bits, *values in rows(page, "| network | bits |")
        for suffix, value in zip(kinds, values, strict=True)
    }


QUICK = [("mobilenet_v3_small_fuse_half_imagenet", "4/4"), ("mobilenet_v2_fuse_full_imagenet", "8/8")]
ALL = [(f"{name}{suffix}_imagenet", bits) for name in TITLES for suffix, _, _ in KINDS for bits in ("4/4", "8/8")]


@pytest.mark.parametrize(("name", "bits"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in ALL])
def test_micronet_scores(name: str, bits: str, page: str) -> None:
    weights, acts = map(int, bits.split("/"))
    cost: Any = ql.analysis.micronet_cost(zoo.get(name, weight_bits=weights, act_bits=acts), SHAPE)
    assert scores(page)[name, bits] == f"{cost.printed:.4f}"


def test_micronet_scores_are_those_of_all_networks_and_the_entry_is_quoted(page):
    found = scores(page)
    assert sorted(found) == sorted(ALL) and "scores 0.5558137893676758" in page
    rise = {t: float(found[name_of(t, "_fuse_full"), "4/4"]) / float(found[name_of(t), "4/4"]) for t in list(TITLES.values())[:5]}
    assert min(rise, key=rise.__getitem__) == "MobileNetV2" and max(rise, key=rise.__getitem__) == "MobileNetV1"
    assert (round(100 * min(rise.values())), round(100 * max(rise.values()))) == (128, 180)


@pytest.mark.slow
@pytest.mark.parametrize("side", [16, 64])
def test_gains_of_layers(side: int, page: str) -> None:
    model, places = zoo.get("mobilenet_v2_imagenet"), {16: (3, 4), 64: (5, 6)}[side]
    found = rows(page, "| block of MobileNetV2 |")
    for place, variant in zip(places, ("half", "full"), strict=True):
        priced = {gain.name: gain.cycles for gain in gains(model, SHAPE, variant, side, side)}  # type: ignore[arg-type]
        assert all(row[place] == f"{priced[row[0].strip('`')]:,}" for row in found)
    chosen = [f"blocks.{i}.spatial" for i in FAMILIES["mobilenet_v2"].hybrid]
    assert "blocks.0.spatial" not in chosen and sorted(priced.values())[-2] == priced["blocks.0.spatial"]


@pytest.mark.slow
def test_only_the_first_hybrid_takes_the_largest_gains() -> None:
    best = gains(zoo.get("mobilenet_v1_imagenet"), SHAPE)
    hybrid = [f"blocks.{i}.spatial" for i in FAMILIES["mobilenet_v1"].hybrid]
    assert {gain.name for gain in best[: len(hybrid)]} == set(hybrid)


@pytest.mark.slow
def test_the_rule_for_published_operations(page: str, tables: ModuleType) -> None:
    for title, kind, _, _, rule, *_ in rows(page, "| network | layers | top-1 % pub."):
        assert int(tables.published_operations(zoo.get(name_of(title, KIND[kind]))) / 1e6) == int(rule)
