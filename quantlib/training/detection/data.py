"""DAC-SDC's data set: `<root>/<class folder>/<name>.jpg`, beside each picture `<name>.xml` (VOC style) with its one object."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any
from xml.parsers import expat

import numpy as np
import torch
from torch import Tensor

from quantlib.training.data import UNREADABLE, Augment, DataError, Images
from quantlib.training.detection.augment import PUBLISHED, Ranges, as_input, augmented, resized

SIZE = (160, 320)  # height, width that the published networks see
LARGEST_XML = 1 << 20  # bytes


@dataclass(frozen=True)
class Label:
    """What one XML file says: the picture's size, the object's class, its box as (left, top, right, bottom) in pixels, and the frame: the
    integer that the last digits of the picture's file name form, its ending left out (0 in test data, whose class is "0")."""

    width: int
    height: int
    name: str
    box: tuple[int, int, int, int]
    frame: int


def read_xml(path: Path) -> Label:
    """DataError names the file and what is wrong with it. Document types are refused, so nothing in a file can grow or fetch anything."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_document_type
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        if path.stat().st_size > LARGEST_XML:
            raise DataError(f"larger than {LARGEST_XML:,} bytes")
        parser.Parse(path.read_bytes(), True)
        return _label(builder.close())
    except (DataError, OSError, expat.ExpatError) as error:
        raise DataError(f"{path}: {error}") from error


def _refuse_document_type(*_: Any) -> None:
    raise DataError("a document type; labels have none")


def _label(root: ElementTree.Element) -> Label:
    def text(place: ElementTree.Element, name: str) -> str:
        found = place.findtext(name)
        if found is None or not found.strip():
            raise DataError(f"no <{name}> in <{place.tag}>")
        return found.strip()

    def number(place: ElementTree.Element, name: str) -> int:
        value = text(place, name)
        if not re.fullmatch(r"-?\d{1,9}", value):
            raise DataError(f"<{name}> is {value!r}, not an integer")
        return int(value)

    objects = root.findall("object")
    if len(objects) != 1:
        raise DataError(f"{len(objects)} objects; DAC-SDC pictures have exactly one")
    width, height = number(root, "size/width"), number(root, "size/height")
    box = tuple(number(objects[0], f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    if width <= 0 or height <= 0:
        raise DataError(f"the picture's size is {width} x {height}")
    if not (box[0] < box[2] and box[1] < box[3] and box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0):
        raise DataError(f"the box {box} is empty or outside of the {width} x {height} picture")
    filename, name = text(root, "filename"), text(objects[0], "name")
    digits = re.search(r"(\d+)(\.[A-Za-z]\w*)?$", filename)
    if not digits and name != "0":
        raise DataError(f"the file name {filename!r} ends in no frame number")
    return Label(width, height, name, (box[0], box[1], box[2], box[3]), int(digits[1]) if digits and name != "0" else 0)


def frame_weights(labels: Sequence[Label]) -> list[float]:
    """0.5 + (frame - first) / (last - first) over the frames of each class; 1 for the class "0" (test data) and for a class with one frame.

    The published code divides by 0 where a class has one frame.
    """
    span: dict[str, tuple[int, int]] = {}
    for label in labels:
        low, high = span.get(label.name, (label.frame, label.frame))
        span[label.name] = min(low, label.frame), max(high, label.frame)
    weights = []
    for label in labels:
        low, high = span[label.name]
        weights.append(1.0 if label.name == "0" or low == high else 0.5 + (label.frame - low) / (high - low))
    return weights


@dataclass(frozen=True, eq=False)
class BoxImages:
    """Pictures with one box each, as a data set of `fit`.

    boxes: (N, 4), x and y of the centre, width, height in shares of the picture; weights: (N,) of the labels. Each picture is resized to
    size = (height, width) and given as blue, green, red, level / 256. Labels of a batch are rows (image in the batch, 0, x, y, w, h,
    weight). Training changes pictures within `ranges` and flips half of them where Augment.flip; a picture that loses its box has no row.
    cached: the resized pictures, uint8 (N, height, width, 3), where they are kept in memory. A file that cannot be read is noted in
    `unreadable`; while training the next one stands in for it, while testing it is left out.
    """

    paths: tuple[str, ...]
    boxes: Tensor
    weights: Tensor
    name: str
    size: tuple[int, int] = SIZE
    ranges: Ranges = PUBLISHED
    strict: bool = False
    cached: np.ndarray | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice) -> BoxImages:
        cached = None if self.cached is None else self.cached[index]
        return replace(self, paths=self.paths[index], boxes=self.boxes[index], weights=self.weights[index], cached=cached)

    def read(
        self, batches: Sequence[Tensor], augment: Augment | None, key: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        if augment and augment.shift:
            raise DataError(f"{self.name}: pictures that are warped at random take no shift; give shift=0")
        files = _Pictures(self, augment, key)
        loader: DataLoader[Any] = DataLoader(files, batch_sampler=[b.tolist() for b in batches], num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
        for pictures in loader:
            for _, _, bad in pictures:
                self.unreadable.update(bad)
            read = [(image, row) for image, row, _ in pictures if image is not None]
            if read:
                rows = [torch.tensor([n, 0.0, *row]) for n, (_, row) in enumerate(read) if row is not None]
                yield torch.stack([image for image, _ in read]), torch.stack(rows) if rows else torch.zeros(0, 7)

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (*size, 3) RGB."""
        from PIL import Image

        if self.cached is not None:
            return self.cached[index]
        with Image.open(self.paths[index]) as picture:
            return resized(np.asarray(picture.convert("RGB")), self.size)

    def in_memory(self) -> BoxImages:
        """The same set with its resized pictures kept; those that cannot be read are left out."""
        kept, pictures = [], []
        for index in range(len(self)):
            try:
                pictures.append(self.pixels(index))
                kept.append(index)
            except UNREADABLE as error:
                if self.strict:
                    raise DataError(f"{self.paths[index]}: {error}") from error
                self.unreadable[self.paths[index]] = f"{type(error).__name__}: {error}"
        if not kept:
            raise DataError(f"{self.name}: none of its {len(self)} pictures can be read")
        paths = tuple(self.paths[index] for index in kept)
        return replace(self, paths=paths, boxes=self.boxes[kept], weights=self.weights[kept], cached=np.stack(pictures))

    def sample(self, count: int) -> tuple[Images, Tensor]:
        """So many pictures, spread evenly over the set, as integers (blue, green, red) for conversion, and their boxes."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        codes = np.stack([self.pixels(int(index))[:, :, ::-1].transpose(2, 0, 1) for index in chosen])
        labels = torch.zeros(len(chosen), dtype=torch.int64)
        return Images(torch.from_numpy(codes.copy()), labels, f"{len(chosen)} of {self.name}", levels=256), self.boxes[chosen]


class _Pictures:
    """index -> (image or None, (x, y, w, h, weight) or None, {path: error}): what a reader process computes."""

    def __init__(self, data: BoxImages, augment: Augment | None, key: tuple[int, int]) -> None:
        self.data, self.augment, self.key = data, augment, key

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[float] | None, dict[str, str]]:
        data, bad = self.data, {}
        for candidate in range(index, index + len(data)):
            candidate %= len(data)
            try:
                pixels = data.pixels(candidate)
            except UNREADABLE as error:
                if data.strict:
                    raise DataError(f"{data.paths[candidate]}: {error}") from error
                bad[data.paths[candidate]] = f"{type(error).__name__}: {error}"
                if self.augment is None:
                    return None, None, bad
                continue
            weight = float(data.weights[candidate])
            if self.augment is None:
                return as_input(pixels), [*data.boxes[candidate].tolist(), weight], bad
            height, width = data.size
            x, y, w, h = data.boxes[candidate].double().numpy() * (width, height, width, height)
            generator = np.random.default_rng([*self.key, 3, index])
            box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            pixels, moved = augmented(pixels, box, self.augment.flip, data.ranges, generator)
            if moved is None:
                return as_input(pixels), None, bad
            left, top, right, bottom = moved
            shares = [(left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height]
            return as_input(pixels), [*map(float, shares), weight], bad
        raise DataError(f"{data.name}: none of its {len(data)} pictures can be read")


def box_images(root: str | Path, strict: bool = False, **settings: Any) -> BoxImages:
    """The set below a folder; settings are fields of `BoxImages`. Label files that cannot be read are left out and listed; with strict they
    are an error. DataError where no picture with a label is found."""
    path = Path(root)
    pictures = sorted(p for p in path.glob("*/*") if p.suffix.lower() in (".jpg", ".jpeg") and not p.name.startswith("."))
    labels: list[Label] = []
    paths: list[str] = []
    unreadable: dict[str, str] = {}
    for picture in pictures:
        file = picture.with_suffix(".xml")
        try:
            label = read_xml(file)
        except DataError as error:
            if strict:
                raise
            unreadable[str(file)] = str(error)
            continue
        labels.append(label)
        paths.append(str(picture))
    if not labels:
        first = f"; the first of {len(unreadable)} problems: {next(iter(unreadable.values()))}" if unreadable else ""
        raise DataError(f"{path} holds no <class folder>/<name>.jpg with <name>.xml beside it{first}")
    boxes = torch.tensor([_shares(label) for label in labels], dtype=torch.float32)
    weights = torch.tensor(frame_weights(labels), dtype=torch.float32)
    name = PurePath(path).name
    return BoxImages(tuple(paths), boxes, weights, name, strict=strict, unreadable=unreadable, **settings)


def _shares(label: Label) -> list[float]:
    left, top, right, bottom = label.box
    return [
        (left + right) / 2 / label.width, (top + bottom) / 2 / label.height, (right - left) / label.width, (bottom - top) / label.height,
    ]  # fmt: skip
