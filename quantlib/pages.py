"""Generated pages: docs/ops.md from the registered ops, docs/zoo.md from the networks' cards (`python -m quantlib docs` writes them), and
the pieces of HTML of which reports are put together."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

HEAD = "<!-- Written by `python -m quantlib docs`; edit the source, not this page. -->\n"


def ops_page() -> str:
    """Every registered op: signature, docstring, and the kernel it comes with."""
    from quantlib.ops import Op

    parts = [
        HEAD,
        "# Integer ops\n",
        "Normative: [integer_semantics.md](integer_semantics.md). How to add one: [add_an_op.md](add_an_op.md).\n",
    ]
    for name, op in sorted(Op.registry.items()):
        if not op.__module__.startswith("quantlib.ops."):
            continue  # an op of somebody's own belongs to their pages
        signature = ", ".join(f.name for f in fields(op) if f.init)
        stem = op.__module__.rpartition(".")[2]
        text = inspect.cleandoc(op.__doc__ or "")
        where = f"`quantlib/ops/{stem}.py`, kernel `quantlib/ops/{stem}.hpp`, {len(op.examples())} examples."
        parts.append(f"## {name}({signature})\n\n```\n{text}\n```\n\n{where}\n")
    return "\n".join(parts)


def zoo_page() -> str:
    """Every registered network: its card."""
    import zoo

    parts = [HEAD, "# Networks\n", "`zoo.get(name, **options)` builds one, `zoo.card(name)` prints this.\n"]
    parts += [f"## {name}\n\n```\n{zoo.card(name)}\n```\n" for name in zoo.names()]
    return "\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {"ops.md": ops_page, "zoo.md": zoo_page}


def write(folder: str | Path = "docs") -> list[Path]:
    """Write all pages into `folder`; returns their paths."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (root / name).write_text(make(), encoding="utf-8")
    return [root / name for name in PAGES]


def stale(folder: str | Path = "docs") -> list[str]:
    """Names of the pages in `folder` that differ from what `write` would put there."""
    root = Path(folder)
    return [n for n, make in PAGES.items() if not (root / n).is_file() or (root / n).read_text(encoding="utf-8") != make()]


# Reports: one HTML file, nothing outside it.

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left } pre { background: #f6f6f6; padding: .8em; overflow-x: auto } img { max-width: 100% }
"""
_ROW = 18  # pixels per bar


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def text(content: str) -> str:
    return f"<pre>{html.escape(content)}</pre>"


def bars(rows: Sequence[tuple[str, float, str]], marked: str = "", limit: float | None = None) -> str:
    """A horizontal bar per (label, value >= 0, what is written behind it), the one labelled `marked` in another colour; a line at limit."""
    most = max([*(value for _, value, _ in rows), limit or 0.0, 1e-9])
    left, wide = 9 + 8 * max((len(label) for label, _, _ in rows), default=0), 420
    parts = []
    for k, (label, value, note) in enumerate(rows):
        length, colour = wide * value / most, "#c0392b" if label == marked or (limit is not None and value > limit) else "#4a7fb5"
        parts.append(
            f'<text x="{left - 6}" y="{k * _ROW + 13}" text-anchor="end">{html.escape(label)}</text>'
            f'<rect x="{left}" y="{k * _ROW + 2}" width="{length:.1f}" height="{_ROW - 4}" fill="{colour}"/>'
            f'<text x="{left + length + 5:.1f}" y="{k * _ROW + 13}">{html.escape(note)}</text>'
        )
    height = len(rows) * _ROW + 4
    if limit is not None:
        x = left + wide * limit / most
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#222" stroke-dasharray="3 3"/>')
    size = f'width="{left + wide + 190}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>'


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """sections: (heading, HTML body)."""
    parts = "".join(f"<h2>{html.escape(heading)}</h2>{body}" for heading, body in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{html.escape(title)}</h1>{parts}</html>\n'
