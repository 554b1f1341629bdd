"""A small detection set in DAC-SDC's layout, made here: small images pasted on blurred ones, or plain shapes where there are no images.

It is for running and watching the whole flow, not a stand-in for the real pictures: the object is a sharp patch on a soft ground.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from quantlib.training.checkpoint import write_bytes
from quantlib.training.data import Images

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = ("ellipse", "triangle", "cross")
SIDES, ASPECTS = (0.12, 0.45), (0.6, 1.7)  # of the object: side in shares of the picture's height, width : height


def make_box_images(
    root: str | Path,
    count: int,
    images: Images | None = None,
    size: tuple[int, int] = (360, 640),
    seed: int = 0,
    names: tuple[str, ...] = (),
) -> Path:
    """Writes `count` pictures of size (height, width) with their labels below root, evenly over the classes; the same call, the same files.

    images: objects and grounds are chosen from them; None: shapes on clouds. names: of the classes (default: CIFAR-10's where there are
    ten, else class0, class1, ...). Frames of a class count from 1.
    """
    root = Path(root)
    if images is not None and not names:
        names = CIFAR10 if images.classes == 10 else tuple(f"class{k}" for k in range(images.classes))
    names = names or SHAPES
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        kind, frame = number % len(names), number // len(names) + 1
        picture, box = _picture(images, kind, size, generator)
        folder, stem = root / f"{names[kind]}1", f"{frame:06d}"
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        write_bytes(folder / f"{stem}.jpg", buffer.getvalue())
        write_bytes(folder / f"{stem}.xml", _xml(f"{stem}.jpg", size, names[kind], box).encode())
    return root


def _picture(images: Images | None, kind: int, size: tuple[int, int], generator: np.random.Generator) -> tuple[Any, tuple[int, ...]]:
    """A picture of class `kind` and the box of its object: (left, top, right, bottom)."""
    from PIL import Image

    height, width = size
    side, aspect = height * generator.uniform(*SIDES), np.sqrt(np.exp(generator.uniform(*np.log(ASPECTS))))
    w, h = max(4, round(side * aspect)), max(4, round(side / aspect))
    left, top = int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1))
    if images is None:
        ground, patch, mask = _clouds(size, generator), *_shape(SHAPES[kind % len(SHAPES)], (h, w), generator)
    else:
        labels = images.labels.numpy()
        one = images.codes[int(generator.choice(np.flatnonzero(labels == kind)))].numpy().transpose(1, 2, 0)
        other = images.codes[int(generator.integers(len(images)))].numpy().transpose(1, 2, 0)
        ground = Image.fromarray(other).resize((width, height), Image.Resampling.BICUBIC)
        patch, mask = Image.fromarray(one).resize((w, h), Image.Resampling.BICUBIC), None
    ground.paste(patch, (left, top), mask)
    return ground, (left, top, left + w, top + h)


def _clouds(size: tuple[int, int], generator: np.random.Generator) -> Any:
    from PIL import Image

    few = Image.fromarray(generator.integers(40, 216, (5, 9, 3), dtype=np.uint8))
    return few.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def _shape(name: str, size: tuple[int, int], generator: np.random.Generator) -> tuple[Any, Any]:
    """A striped shape that touches its box on all four sides, and its mask."""
    from PIL import Image, ImageDraw

    height, width = size
    stripes = np.add.outer(np.arange(height), np.arange(width)) // max(1, min(size) // 8) % 2
    colours = generator.integers(0, 256, (2, 3), dtype=np.uint8)
    colours[1] = 255 - colours[0]
    mask = Image.new("L", (width, height), 0)
    pen, right, bottom = ImageDraw.Draw(mask), width - 1, height - 1
    if name == "ellipse":
        pen.ellipse((0, 0, right, bottom), fill=255)
    elif name == "triangle":
        pen.polygon([(0, bottom), (right // 2, 0), (right, bottom)], fill=255)
    else:
        pen.rectangle((width // 3, 0, right - width // 3, bottom), fill=255)
        pen.rectangle((0, height // 3, right, bottom - height // 3), fill=255)
    return Image.fromarray(colours[stripes]), mask


def _xml(filename: str, size: tuple[int, int], name: str, box: tuple[int, ...]) -> str:
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return (
        f"<annotation>\n  <filename>{escape(filename)}</filename>\n"
        f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>\n"
        f"  <object><name>{escape(name)}</name><bndbox>{corners}</bndbox></object>\n</annotation>\n"
    )
