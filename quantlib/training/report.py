"""A report a person can read: one HTML file with its figures inside, written whole or not at all."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quantlib.training.checkpoint import write_bytes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left } pre { background: #f6f6f6; padding: .8em; overflow-x: auto } img { max-width: 100% }
"""


def write(path: Path, text: str) -> Path:
    """Whole or not at all: a reader sees the old file or the new one."""
    return write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> Path:
    return write(path, json.dumps(content, indent=1, default=str) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def text(content: str) -> str:
    return f"<pre>{html.escape(content)}</pre>"


def figure(plot: Any, caption: str) -> str:
    """A matplotlib figure as an embedded PNG."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return _picture(buffer.getvalue(), caption)


def figure_file(path: Path, caption: str) -> str:
    """A PNG file, embedded."""
    return _picture(path.read_bytes(), caption)


def _picture(png: bytes, caption: str) -> str:
    data, label = base64.b64encode(png).decode(), html.escape(caption)
    return f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>'


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """sections: (heading, HTML body)."""
    parts = "".join(f"<h2>{html.escape(heading)}</h2>{body}" for heading, body in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{html.escape(title)}</h1>{parts}</html>\n'
