"""Readable tables in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def cell(value: Any) -> str:
    """Integers with thousands separators, None as a dash, fractions with six digits."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def shape(size: Sequence[int]) -> str:
    """A shape without its batch axis of 1: 3x224x224."""
    return "x".join(map(str, size[1:] if len(size) > 1 and size[0] == 1 else size)) or "1"


def aligned(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Columns of equal width, the first `left` of them flush left, numbers flush right; a rule under the header."""
    lines = [list(header), *([cell(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()

    return "\n".join([line(lines[0]), "  ".join("-" * w for w in widths), *map(line, lines[1:])])
