"""Labelled images as integers: scikit-learn's digits, npz archives, zips and folders of class folders."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp")


class DataError(ValueError):
    """A data set that is missing or not laid out as expected; the message says what was found and what is read."""


@dataclass(frozen=True, eq=False)
class Images:
    """codes: uint8 (N, C, H, W) as stored on disk; labels: int64 (N,); name for reports."""

    codes: Tensor
    labels: Tensor
    name: str

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 4 or len(self.codes) != len(self.labels):
            raise DataError(
                f"{self.name}: images must be uint8 (N, C, H, W) with one label each, got {self.codes.dtype} {tuple(self.codes.shape)}"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: slice) -> Images:
        return replace(self, codes=self.codes[index], labels=self.labels[index])

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(real images in [0, 1] float32, labels), in the given order or as stored."""
        order = torch.arange(len(self)) if order is None else order
        for chunk in order.split(size):
            yield as_real(self.codes[chunk]), self.labels[chunk]


def as_real(codes: Tensor) -> Tensor:
    """uint8 codes -> float32 in [0, 1], code / 255."""
    return codes.float() / 255


def digits(split: str, test_images: int = 360) -> Images:
    """scikit-learn's 1,797 scanned digits, 8x8, grey levels 0..16 spread to 0..255; a fixed stratified split into "train" and "test"."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise DataError(f"digits have the splits train and test, not {split!r}")
    pixels, labels = load_digits(return_X_y=True)
    codes = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = train_test_split(codes, labels.astype(np.int64), test_size=test_images, stratify=labels, random_state=0)
    x, y = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return Images(torch.from_numpy(x.copy()), torch.from_numpy(y.copy()), f"digits {split}")


def read_images(source: str | Path, split: str = "test") -> Images:
    """The word digits, an .npz with `images` (N, H, W, C) uint8 and `labels`, or a .zip or folder of [`<split>/`]`<class>/<image>` files.

    The label of a class folder is its place in alphabetical order. DataError when nothing of the kind is there or sizes differ.
    """
    if str(source) == "digits":
        return digits(split)
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return _class_folders(((PurePosixPath(p.relative_to(path).as_posix()), p.read_bytes()) for p in files), split, path.name)
    if not path.is_file():
        raise DataError(f"no data set at {path}; give digits, an .npz, a .zip of class folders, or a folder of them")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return _class_folders(((PurePosixPath(n), archive.read(n)) for n in sorted(archive.namelist())), split, path.name)
    if path.suffix != ".npz":
        raise DataError(f"{path.name}: unknown kind of data set; readable are .npz, .zip and folders")
    with np.load(path, allow_pickle=False) as arrays:
        if not {"images", "labels"} <= set(arrays.files):
            raise DataError(f"{path.name} holds {', '.join(arrays.files)}; images and labels are needed")
        images, labels = arrays["images"], arrays["labels"].astype(np.int64)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"{path.name}: images must be (N, H, W, 1 or 3), got {images.shape}")
    return Images(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels), path.stem)


def _class_folders(files: Iterable[tuple[PurePosixPath, bytes]], split: str, name: str) -> Images:
    from PIL import Image

    pixels: list[np.ndarray] = []
    folders: list[str] = []
    for path, data in files:
        inside = split in path.parts[:-2] or len(path.parts) == 2 or not {"train", "test", "val"} & set(path.parts[:-2])
        if path.suffix.lower() not in _IMAGE_ENDINGS or len(path.parts) < 2 or not inside:
            continue
        with Image.open(io.BytesIO(data)) as image:
            pixels.append(np.asarray(image.convert("RGB")))
        folders.append(path.parts[-2])
    if not pixels:
        raise DataError(f"{name} holds no <class>/<image> files for the split {split!r}")
    sizes = {p.shape for p in pixels}
    if len(sizes) > 1:
        raise DataError(f"{name} mixes image sizes: {', '.join(map(str, sorted(sizes)[:4]))}")
    _, labels = np.unique(folders, return_inverse=True)
    codes = np.stack(pixels).transpose(0, 3, 1, 2)
    return Images(torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(labels.astype(np.int64)), f"{name} {split}")
