"""Generated pages: docs/ops.md from the registered ops, docs/zoo.md from the networks' cards. `python -m quantlib docs` writes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

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
