"""Labelled images as integers: scikit-learn's digits, CIFAR, npz archives, zips and folders of class folders.

Small sets are decoded once and kept as uint8 (`Images`); large ones stay files and are decoded as they are asked for (`ImageFiles`). Both
answer the same questions of the training loop. What is random in an epoch is drawn from (seed, epoch, image) alone: neither the number of
processes nor the place where a run was resumed changes an image.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp")
_SPLITS = {"train", "test", "val"}
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, zipfile.BadZipFile)  # what broken files raise
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(ValueError):
    """A data set that is missing or not laid out as expected; the message says what was found and what is read."""


@dataclass(frozen=True)
class Augment:
    """What is random about training images. shift: largest displacement in pixels, zeros entering; flip: mirrored in half of the cases."""

    shift: int = 0
    flip: bool = False


class Data(Protocol):
    """What the training loop asks of a data set. unreadable: file -> what was wrong with it, filled while reading."""

    @property
    def name(self) -> str: ...

    @property
    def unreadable(self) -> dict[str, str]: ...

    def __len__(self) -> int: ...

    def read(
        self, batches: Sequence[Tensor], augment: Augment | None, key: tuple[int, int], workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(real images (N, C, H, W), labels) for each tensor of indices. augment None: as for testing. key: seed and epoch."""
        ...


@dataclass(frozen=True, eq=False)
class Images:
    """codes: uint8 (N, C, H, W) as stored on disk; labels: int64 (N,); name for reports; unreadable: files left out, and why.

    Models see (code / levels - mean) / std. side: images are resized to side x side first (`resized`), 0: not at all.
    """

    codes: Tensor
    labels: Tensor
    name: str
    unreadable: dict[str, str] = field(default_factory=dict)
    levels: int = 255
    side: int = 0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 4 or len(self.codes) != len(self.labels):
            raise DataError(
                f"{self.name}: images must be uint8 (N, C, H, W) with one label each, got {self.codes.dtype} {tuple(self.codes.shape)}"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: slice | Tensor) -> Images:
        return replace(self, codes=self.codes[index], labels=self.labels[index])

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def read(
        self, batches: Sequence[Tensor], augment: Augment | None, key: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        augment = augment or Augment()
        draws = self._draws(augment, key)
        for rows in batches:
            x = as_real(resized(self.codes[rows], self.side), self.levels)
            if augment.flip:
                x = torch.where(draws[rows, 2].bool().reshape(-1, 1, 1, 1), x.flip(3), x)
            if augment.shift:
                x = shifted(x, augment.shift, draws[rows, :2])
            yield normalised(x, self.mean, self.std), self.labels[rows]

    def _draws(self, augment: Augment, key: tuple[int, int]) -> Tensor:
        """(N, 3): offset of the rows and of the columns, in 0 .. 2 shift, and whether to flip."""
        high = (2 * augment.shift + 1, 2 * augment.shift + 1, 2)
        return torch.from_numpy(np.random.default_rng([*key, 1]).integers(0, high, (len(self), 3)))


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files decoded when asked for, as float32 (3, size, size): (pixel / levels - mean) / std.

    Training (augment given): a random area of `crop` (a share) to the whole, drawn by `area`, cut out and resized to size with the filter
    named `resample`; policy(PIL image, generator), such as `autoaugment`, changes it; lighting: standard deviation of the PCA colour shift,
    0 for none; Augment.flip mirrors half of them.
    Testing: the shorter side resized to `resize`, the middle cut out; cut_first: a square of the share size / resize of the shorter side
    cut out of the middle and then resized; window: height and width of the middle, where it is no square.
    A file that cannot be read is noted in `unreadable`; while training the next file stands in for it, while testing it is left out.
    """

    paths: tuple[str, ...]
    labels: Tensor
    name: str
    size: int = 224
    resize: int = 256
    lighting: float = 0.1
    crop: float = 0.08
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    levels: int = 255
    policy: Callable[[Any, np.random.Generator], Any] | None = None
    area: Callable[[int, int, np.random.Generator, float], tuple[int, int, int, int]] | None = None
    resample: str = "bilinear"
    cut_first: bool = False
    window: tuple[int, int] | None = None
    strict: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: slice) -> ImageFiles:
        return replace(self, paths=self.paths[index], labels=self.labels[index])

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def read(
        self, batches: Sequence[Tensor], augment: Augment | None, key: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        if augment and augment.shift:
            raise DataError(f"{self.name}: images that are cut out at random take no shift; give shift=0")
        files = _Files(self, augment, key)
        loader: DataLoader[Any] = DataLoader(files, batch_sampler=[b.tolist() for b in batches], num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
        for rows in loader:
            for _, _, bad in rows:
                self.unreadable.update(bad)
            images = [image for image, _, _ in rows if image is not None]
            if images:
                yield torch.stack(images), torch.tensor([label for image, label, _ in rows if image is not None])

    def decode(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return image.convert("RGB")

    def training_image(self, picture: Any, augment: Augment, generator: np.random.Generator) -> Tensor:
        """The published order: crop, policy or lighting, flip, normalise."""
        left, top, width, height = (self.area or random_area)(picture.width, picture.height, generator, self.crop)
        box = (left, top, left + width, top + height)
        picture = picture.crop(box).resize((self.size, self.size), self._filter)
        pixels = np.asarray(self.policy(picture, generator) if self.policy else picture)
        if self.lighting:
            pixels = lit(pixels, generator.normal(0.0, self.lighting, 3))
        if augment.flip and generator.random() < 0.5:
            pixels = pixels[:, ::-1]
        return self.normalised(pixels)

    def test_pixels(self, picture: Any) -> np.ndarray:
        """uint8 (size, size, 3), or (*window, 3)."""
        if self.cut_first:
            left, top, side, _ = middle_area(picture.width, picture.height, self.size / self.resize)
            return np.asarray(picture.crop((left, top, left + side, top + side)).resize((self.size, self.size), self._filter))
        width, height = (int(self.resize * side / min(picture.size)) for side in picture.size)
        high, wide = self.window or (self.size, self.size)
        left, top = round((width - wide) / 2), round((height - high) / 2)
        whole = picture.resize((width, height), self._filter)
        return np.asarray(whole.crop((left, top, left + wide, top + high)))

    @property
    def _filter(self) -> Any:
        from PIL import Image

        return Image.Resampling[self.resample.upper()]

    def sample(self, count: int, seed: int = 0) -> Images:
        """So many readable images, chosen at random, as they are tested, kept as integers in memory."""
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        for index in np.random.default_rng(seed).permutation(len(self)):
            if len(pixels) == count:
                break
            try:
                pixels.append(self.test_pixels(self.decode(int(index))))
            except UNREADABLE as error:
                self.unreadable[self.paths[index]] = f"{type(error).__name__}: {error}"
                continue
            labels.append(int(self.labels[index]))
        codes = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
        return Images(codes, torch.tensor(labels), f"{len(labels)} of {self.name}")

    def normalised(self, pixels: np.ndarray) -> Tensor:
        x = as_real(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), self.levels)
        return normalised(x, self.mean, self.std)


class _Files:
    """index -> (image or None, label, {path: error}): what a reader process of `ImageFiles` computes."""

    def __init__(self, data: ImageFiles, augment: Augment | None, key: tuple[int, int]) -> None:
        self.data, self.augment, self.key = data, augment, key

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, dict[str, str]]:
        data, bad = self.data, {}
        for candidate in range(index, index + len(data)):
            candidate %= len(data)
            try:
                picture = data.decode(candidate)
            except UNREADABLE as error:
                if data.strict:
                    raise DataError(f"{data.paths[candidate]}: {error}") from error
                bad[data.paths[candidate]] = f"{type(error).__name__}: {error}"
                if self.augment is None:
                    break
                continue
            label = int(data.labels[candidate])
            if self.augment is None:
                return data.normalised(data.test_pixels(picture)), label, bad
            generator = np.random.default_rng([*self.key, 2, index])
            return data.training_image(picture, self.augment, generator), label, bad
        if self.augment is not None:
            raise DataError(f"{data.name}: none of its {len(data)} files can be read")
        return None, -1, bad


def as_real(codes: Tensor, levels: int = 255) -> Tensor:
    """uint8 codes -> float32 in [0, 1], code / levels."""
    return codes.float() / levels


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std by channel, (..., C, H, W); x itself for mean 0 and standard deviation 1."""
    if set(mean) == {0.0} and set(std) == {1.0}:
        return x
    return (x - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)


def resized(codes: Tensor, side: int) -> Tensor:
    """uint8 (N, C, H, W) -> (N, C, side, side), bilinear and rounded to codes again, as image libraries enlarge; side 0: unchanged."""
    if not side or codes.shape[-2:] == (side, side):
        return codes
    return F.interpolate(codes.float(), (side, side), mode="bilinear", antialias=True).round().to(torch.uint8)


def shifted(x: Tensor, most: int, offsets: Tensor) -> Tensor:
    """Image n cut at offsets[n] (row, column; 0 .. 2 most) out of itself with a border of `most` zeros: (N, C, H, W) -> same."""
    n, _, height, width = x.shape
    padded = F.pad(x, (most,) * 4)
    rows = offsets[:, 0, None] + torch.arange(height)
    columns = offsets[:, 1, None] + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_area(width: int, height: int, generator: np.random.Generator, least: float = 0.08) -> tuple[int, int, int, int]:
    """(left, top, width, height): least to 1 of the area, sides 3:4 to 4:3; after ten misses the largest middle part of such sides."""
    for _ in range(10):
        area = width * height * generator.uniform(least, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def random_area_by_height(width: int, height: int, generator: np.random.Generator, least: float = 0.08) -> tuple[int, int, int, int]:
    """(left, top, width, height) as TensorFlow's distorted bounding boxes: the ratio of the sides uniform in 3:4 to 4:3, the height a
    uniform integer between those that give `least` and the whole of the area, no higher than fits into the image.

    Areas of another share, or below a tenth, are drawn again; after ten misses the middle square of 7/8 of the shorter side.
    """
    whole = width * height
    for _ in range(10):
        ratio = generator.uniform(3 / 4, 4 / 3)
        low, high = round((least * whole / ratio) ** 0.5), round((whole / ratio) ** 0.5)
        high = min(high, height)
        while high > 1 and round(high * ratio) > width:
            high -= 1
        h = int(generator.integers(min(low, high), high + 1))
        w = round(h * ratio)
        if max(least, 0.1) * whole <= w * h <= whole:
            return int(generator.integers(0, width - w + 1)), int(generator.integers(0, height - h + 1)), w, h
    return middle_area(width, height, 224 / 256)


def middle_area(width: int, height: int, share: float) -> tuple[int, int, int, int]:
    """(left, top, side, side): the square of int(share of the shorter side) in the middle."""
    side = int(share * min(width, height))
    return (width - side) // 2, (height - side) // 2, side, side


@dataclass(frozen=True, eq=False)
class Phases:
    """Data sets of the same images that take turns: parts are (first epoch, data set), the first one from epoch 0."""

    parts: tuple[tuple[int, ImageFiles], ...]

    def at(self, epoch: int) -> ImageFiles:
        return next(data for first, data in reversed(self.parts) if first <= epoch)

    @property
    def name(self) -> str:
        return self.parts[0][1].name + "".join(f", from epoch {first} {data.size} pixels" for first, data in self.parts[1:])

    @property
    def unreadable(self) -> dict[str, str]:
        return {path: reason for _, data in self.parts for path, reason in data.unreadable.items()}

    def __len__(self) -> int:
        return len(self.parts[0][1])

    def read(
        self, batches: Sequence[Tensor], augment: Augment | None, key: tuple[int, int], workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self.at(key[1]).read(batches, augment, key, workers)


_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def lit(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) + 255 * eigenvectors @ (alpha * eigenvalues), clipped and truncated (FracBNN's published augmentation)."""
    colour = 255 * (_EIGENVECTORS @ (alpha * _EIGENVALUES))
    return np.clip(pixels + colour, 0, 255).astype(np.uint8)


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


def read_images(source: str | Path, split: str = "test", strict: bool = False) -> Images:
    """A whole data set in memory.

    source: the word digits; an .npz with `images` (N, H, W, C) uint8 and `labels`; a .zip or folder of [`<split>/`]`<class>/<image>` files;
    a folder that holds CIFAR-10 or CIFAR-100 as torchvision unpacks it. The label of a class folder is its place in alphabetical order.
    Files that cannot be decoded are left out and listed in `unreadable`; strict: they are an error.
    DataError when nothing of the kind is there or sizes differ.
    """
    if str(source) == "digits":
        return digits(split)
    path = Path(source)
    if path.is_dir():
        for folder in (path, *(path / name for name in ("cifar-10-batches-py", "cifar-100-python"))):
            if (folder / "data_batch_1").is_file() or ((folder / "train").is_file() and (folder / "test").is_file()):
                return cifar(folder, split)
        found = ((PurePosixPath(p.relative_to(path).as_posix()), p) for p in sorted(path.rglob("*")) if p.is_file())
        return _class_folders(((name, p.read_bytes) for name, p in _of_split(found, split)), split, path.name, strict)
    if not path.is_file():
        raise DataError(f"no data set at {path}; give digits, an .npz, a .zip of class folders, or a folder of them")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = ((PurePosixPath(n), n) for n in sorted(archive.namelist()))
            files = ((name, partial(archive.read, n)) for name, n in _of_split(members, split))
            return _class_folders(files, split, path.name, strict)
    if path.suffix != ".npz":
        raise DataError(f"{path.name}: unknown kind of data set; readable are .npz, .zip and folders")
    with np.load(path, allow_pickle=False) as arrays:
        if not {"images", "labels"} <= set(arrays.files):
            raise DataError(f"{path.name} holds {', '.join(arrays.files)}; images and labels are needed")
        images, labels = arrays["images"], arrays["labels"].astype(np.int64)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"{path.name}: images must be (N, H, W, 1 or 3), got {images.shape}")
    return Images(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels), path.stem)


def image_files(folder: str | Path, split: str, **settings: Any) -> ImageFiles:
    """The files of `<folder>/<split>/<class>/<image>` (ImageNet's layout), undecoded; settings are fields of `ImageFiles`.

    Classes are numbered over all splits of the folder, so that one without images of some class numbers the others as its neighbour does.
    """
    path = Path(folder)
    files = ((PurePosixPath(p.relative_to(path).as_posix()), p) for p in sorted(path.rglob("*")) if p.is_file())
    found = [(name, p) for name, p in files if name.suffix.lower() in _IMAGE_ENDINGS]
    chosen = [(name.parts[-2], str(p)) for name, p in _of_split(found, split)]
    if not chosen:
        raise DataError(f"{path} holds no {split}/<class>/<image> files; readable endings are {', '.join(_IMAGE_ENDINGS)}")
    classes = sorted({name.parts[-2] for name, _ in found if len(name.parts) >= 2} - _SPLITS)
    labels = np.searchsorted(classes, [name for name, _ in chosen])
    return ImageFiles(tuple(p for _, p in chosen), torch.from_numpy(labels.astype(np.int64)), f"{path.name} {split}", **settings)


def _of_split(files: Iterable[tuple[PurePosixPath, Any]], split: str) -> Iterator[tuple[PurePosixPath, Any]]:
    """Those in a class folder of this split, or in class folders of no split; images in a split's folder itself have no class."""
    for name, where in files:
        above = set(name.parts[:-2])
        if len(name.parts) >= 2 and name.parts[-2] not in _SPLITS and (split in above or not _SPLITS & above):
            yield name, where


def _class_folders(files: Iterable[tuple[PurePosixPath, Callable[[], bytes]]], split: str, name: str, strict: bool) -> Images:
    from PIL import Image

    pixels: list[np.ndarray] = []
    folders: list[str] = []
    all_folders: set[str] = set()
    unreadable: dict[str, str] = {}
    for path, content in files:
        if path.suffix.lower() not in _IMAGE_ENDINGS:
            continue
        all_folders.add(path.parts[-2])
        try:
            with Image.open(io.BytesIO(content())) as image:
                pixels.append(np.asarray(image.convert("RGB")))
        except UNREADABLE as error:
            if strict:
                raise DataError(f"{name}: {path} cannot be read: {error}") from error
            unreadable[str(path)] = f"{type(error).__name__}: {error}"
            continue
        folders.append(path.parts[-2])
    if not pixels:
        broken = f" ({len(unreadable)} cannot be read)" if unreadable else ""
        raise DataError(f"{name} holds no <class>/<image> files for the split {split!r}{broken}")
    sizes = {p.shape for p in pixels}
    if len(sizes) > 1:
        raise DataError(f"{name} mixes image sizes: {', '.join(map(str, sorted(sizes)[:4]))}")
    labels = np.searchsorted(sorted(all_folders), folders)
    codes = np.stack(pixels).transpose(0, 3, 1, 2)
    return Images(torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(labels.astype(np.int64)), f"{name} {split}", unreadable)


class _CifarUnpickler(pickle.Unpickler):
    """Builds numpy arrays, strings and containers, and nothing else: the published CIFAR files are pickles."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise DataError(f"a CIFAR file holds arrays and lists; this one asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module, name)


def cifar(folder: str | Path, split: str) -> Images:
    """CIFAR-10 (data_batch_1 ... 5, test_batch) or CIFAR-100 (train, test; fine labels), as torchvision unpacks them."""
    path = Path(folder)
    if split not in ("train", "test"):
        raise DataError(f"CIFAR has the splits train and test, not {split!r}")
    ten = (path / "data_batch_1").is_file()
    files = sorted(path.glob("data_batch_*")) if ten and split == "train" else [path / ("test_batch" if ten else split)]
    codes, labels = [], []
    for file in files:
        try:
            content = _CifarUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise DataError(f"{file}: {error}") from error
        codes.append(np.asarray(content["data"], np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(content["labels" if ten else "fine_labels"], np.int64))
    name = f"CIFAR-{10 if ten else 100} {split}"
    return Images(torch.from_numpy(np.concatenate(codes)), torch.from_numpy(np.concatenate(labels)), name)
