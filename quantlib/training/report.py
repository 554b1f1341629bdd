"""A report a person can read: one HTML file with its figures inside, written whole or not at all."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from quantlib.pages import page as page
from quantlib.pages import table as table
from quantlib.pages import text as text
from quantlib.training.checkpoint import write_bytes


def write(path: Path, text: str) -> Path:
    """Whole or not at all: a reader sees the old file or the new one."""
    return write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> Path:
    return write(path, json.dumps(content, indent=1, default=str) + "\n")


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
