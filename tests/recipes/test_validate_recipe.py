"""docs/validation.md holds what recipes/validate.py prints, and what the recipe counts itself is counted by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from quantlib.io.mixq_export import DEFAULT_PARALLELISM

TABLES = ["fracbnn_cifar10", "fracbnn_imagenet", "ultranet", "contest", "synetgy"]


@pytest.fixture(scope="module")
def validate(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("validate")


def tables_of(page: str) -> dict[str, str]:
    return {name: text.strip() for name, text in re.findall(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", page, re.S)}


def test_the_page_has_a_place_for_every_table_and_no_other(validate: ModuleType, root: Path) -> None:
    tables = tables_of((root / "docs/validation.md").read_text())
    assert set(tables) == {*validate.TABLES, "timed"} and all(tables.values())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "fracbnn_cifar10" else pytest.mark.slow) for n in TABLES],
)
def test_the_page_holds_what_the_command_prints(validate: ModuleType, root: Path, name: str) -> None:
    assert tables_of((root / "docs/validation.md").read_text())[name] == validate.main(["--only", name])[name]


def test_the_tables_are_those_of_the_tests(validate: ModuleType) -> None:
    assert list(validate.TABLES) == TABLES


def test_the_generators_cycles(validate: ModuleType) -> None:
    """76,800 in the first layer and 153,600 in every other one (by hand: 160 * 160 * 1 * 3, and 80 * 80 * 8 * 3 in the second)."""
    assert validate.generator_cycles(DEFAULT_PARALLELISM["ultranet"]) == [76_800, *[153_600] * 7]


def test_the_published_engines_cycles(validate: ModuleType) -> None:
    """Layer by layer: stem, six at 32x32, the strided one and five at 16x16, the strided one and five at 8x8."""
    stem = 3 * 1104 + 1042
    first = 6 * (2 * 1104 + 1042 + 4101)
    second = 2 * (2 * 1104 + 274) + 4101 + 5 * (2 * (2 * 304 + 274) + 1029)
    third = 4 * (2 * 304 + 82) + 1029 + 5 * (4 * (2 * 96 + 82) + 261)
    assert validate.published_engine(validate.graph_of("fracbnn_cifar10", fixed_point="authors")) == stem + first + second + third


def test_errors_are_percent_of_the_published_figure_above(validate: ModuleType) -> None:
    rows = [validate.Row("theirs", 200, 10.0, 4), validate.Row("ours", 100, 12.5, 5, 6, ours=True)]
    lines = validate.markdown(rows).splitlines()
    assert lines[2] == "| **theirs** | 200 | 10.0 | 4 |  |  |"
    assert lines[3] == "| ours | 100 (-50.0 %) | 12.5 (+25.0 %) | 5 (+25.0 %) | 6 |  |"


def test_tables_go_between_their_marks(validate: ModuleType, tmp_path: Path) -> None:
    page = "a\n<!-- table x -->\nold\nlines\n<!-- end -->\nb\n<!-- table y -->\n<!-- end -->\n"
    assert validate.placed(page, {"y": "| new |"}) == page.replace("<!-- table y -->\n", "<!-- table y -->\n| new |\n")
    assert validate.placed(page, {"x": "new"}) == page.replace("old\nlines", "new")
    with pytest.raises(SystemExit, match="0 places for table z"):
        validate.placed(page, {"z": ""})
