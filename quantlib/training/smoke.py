"""What `--smoke` runs on: tiny data sets made on the spot from scikit-learn's digits, and an untrained teacher."""

from __future__ import annotations

from pathlib import Path

from quantlib.training.data import Images, digits


def enlarged_digits(split: str, count: int, factor: int = 4) -> Images:
    """The first digits, every pixel factor x factor times (4: 32x32), in three equal channels."""
    few = digits(split)[:count]
    codes = few.codes.repeat_interleave(factor, 2).repeat_interleave(factor, 3).repeat(1, 3, 1, 1)
    return Images(codes, few.labels, few.name)


def digit_files(folder: str | Path, train: int = 48, test: int = 16, side: int = 80) -> Path:
    """`<folder>/train|val/<class>/<image>.jpg`: so many digits of side x side pixels, in two classes (even, odd)."""
    from PIL import Image

    folder = Path(folder)
    for split, data in (("train", digits("train")[:train]), ("val", digits("test")[:test])):
        for n, (codes, label) in enumerate(zip(data.codes, data.labels.tolist())):
            path = folder / split / str(label % 2) / f"{n:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(codes[0].numpy()).resize((side, side)).save(path)
    return folder


def untrained_teacher(name: str, path: str | Path, classes: int = 2) -> Path:
    """Random weights of torchvision's network `name` as a .safetensors file."""
    from safetensors.torch import save_file
    from torchvision.models import get_model

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(get_model(name, weights=None, num_classes=classes).state_dict(), path)
    return Path(path)
