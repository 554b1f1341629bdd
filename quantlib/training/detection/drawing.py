"""Pictures of found and true boxes, to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantlib.training.checkpoint import write_bytes
from quantlib.training.detection.boxes import corners, overlap

TRUE, FOUND = (40, 200, 60), (235, 60, 40)


def draw_boxes(pixels: np.ndarray, true: Tensor | None, found: Tensor, text: str = "") -> np.ndarray:
    """uint8 (H, W, 3) with the true box (green) and the found one (red), each (4,) x, y, w, h in pixels, and a line of text."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(np.array(pixels))
    pen = ImageDraw.Draw(picture)
    for box, colour in ((true, TRUE), (found, FOUND)):
        if box is not None:
            left, top, right, bottom = corners(box).nan_to_num(0, 1e4, -1e4).clamp(-1e4, 1e4).tolist()
            pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
    if text:
        left, top, right, bottom = pen.textbbox((3, 2), text)
        pen.rectangle((left - 2, top - 1, right + 2, bottom + 2), fill=(0, 0, 0))
        pen.text((3, 2), text, fill=(255, 255, 255))
    return np.asarray(picture)


def save_pictures(folder: Path, pixels: Sequence[np.ndarray], true: Tensor, found: Tensor, names: Sequence[str]) -> list[Path]:
    """One PNG per picture, named as it with its overlap in the corner. true, found: (N, 4) in pixels."""
    scores = overlap(found, true)
    return [
        save_png(folder / f"{Path(name).parent.name}_{Path(name).stem}.png", draw_boxes(p, t, f, f"IoU {score:.2f}"))
        for p, t, f, name, score in zip(pixels, true, found, names, scores.tolist(), strict=True)
    ]


def sheet(pictures: Sequence[np.ndarray], columns: int = 4) -> np.ndarray:
    """Pictures of one size side by side, row by row, white where the last row is short."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    paper = np.full((rows * (height + 4), columns * (width + 4), 3), 255, np.uint8)
    for n, picture in enumerate(pictures):
        top, left = n // columns * (height + 4), n % columns * (width + 4)
        paper[top : top + height, left : left + width] = picture
    return paper


def save_png(path: Path, pixels: np.ndarray) -> Path:
    """Whole or not at all."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return write_bytes(path, buffer.getvalue())


def in_pixels(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) boxes in shares of a picture of size (height, width) -> pixels."""
    return shares * torch.tensor((size[1], size[0], size[1], size[0]), dtype=shares.dtype)
