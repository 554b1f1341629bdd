"""AutoAugment's policy for ImageNet, as the published MicroNet training of ProxylessNAS applied it.

Cubuk, Zoph, Mane, Vasudevan, Le, "AutoAugment: Learning Augmentation Policies from Data", CVPR 2019, arXiv 1805.09501. Two traits of that
training differ from the paper: rotations are always positive, and their corners are grey.
"""

from __future__ import annotations

from typing import Any

import numpy as np

GREY = 128  # of what a shear or a rotation uncovers

POLICY: tuple[tuple[float, str, int, float, str, int], ...] = (  # probability, operation, index of its magnitude: twice
    (0.4, "posterize", 8, 0.6, "rotate", 9),
    (0.6, "solarize", 5, 0.6, "autocontrast", 5),
    (0.8, "equalize", 8, 0.6, "equalize", 3),
    (0.6, "posterize", 7, 0.6, "posterize", 6),
    (0.4, "equalize", 7, 0.2, "solarize", 4),
    (0.4, "equalize", 4, 0.8, "rotate", 8),
    (0.6, "solarize", 3, 0.6, "equalize", 7),
    (0.8, "posterize", 5, 1.0, "equalize", 2),
    (0.2, "rotate", 3, 0.6, "solarize", 8),
    (0.6, "equalize", 8, 0.4, "posterize", 6),
    (0.8, "rotate", 8, 0.4, "color", 0),
    (0.4, "rotate", 9, 0.6, "equalize", 2),
    (0.0, "equalize", 7, 0.8, "equalize", 8),
    (0.6, "invert", 4, 1.0, "equalize", 8),
    (0.6, "color", 4, 1.0, "contrast", 8),
    (0.8, "rotate", 8, 1.0, "color", 2),
    (0.8, "color", 8, 0.8, "solarize", 7),
    (0.4, "sharpness", 7, 0.6, "invert", 8),
    (0.6, "shearX", 5, 1.0, "equalize", 9),
    (0.4, "color", 0, 0.6, "equalize", 3),
    (0.4, "equalize", 7, 0.2, "solarize", 4),
    (0.6, "solarize", 5, 0.6, "autocontrast", 5),
    (0.6, "invert", 4, 1.0, "equalize", 8),
    (0.6, "color", 4, 1.0, "contrast", 8),
    (0.8, "equalize", 8, 0.6, "equalize", 3),
)

MAGNITUDES: dict[str, tuple[float, ...]] = {  # by index 0..9
    **dict.fromkeys(("shearX", "shearY"), tuple(0.3 * i / 9 for i in range(10))),
    "rotate": tuple(30 * i / 9 for i in range(10)),  # degrees, anticlockwise
    **dict.fromkeys(
        ("color", "contrast", "sharpness", "brightness"), tuple(0.9 * i / 9 for i in range(10))
    ),  # distance of the factor from 1
    "posterize": (8, 8, 7, 7, 6, 6, 5, 5, 4, 4),  # bits that are kept
    "solarize": tuple(256 * (1 - i / 9) for i in range(10)),  # values from here on are inverted
    **dict.fromkeys(("autocontrast", "equalize", "invert"), (0.0,) * 10),  # take no magnitude
}
SIGNED = {"shearX", "shearY", "color", "contrast", "sharpness", "brightness"}  # of random sign


def augmented(picture: Any, name: str, index: int, sign: int = 1) -> Any:
    """One operation on a PIL image (RGB) at magnitude index 0..9; sign, of those in `SIGNED`: 1 or -1. The size stays.

    Raises KeyError for an unknown operation, IndexError for an index beyond 9.
    """
    from PIL import Image, ImageEnhance, ImageOps

    size = MAGNITUDES[name][index]
    if name in ("shearX", "shearY"):
        slope = sign * size
        matrix = (1, slope, 0, 0, 1, 0) if name == "shearX" else (1, 0, 0, slope, 1, 0)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(GREY,) * 3)
    if name == "rotate":
        turned = picture.convert("RGBA").rotate(size)  # what it uncovers is transparent
        return Image.composite(turned, Image.new("RGBA", picture.size, (GREY,) * 4), turned).convert("RGB")
    if name in SIGNED:
        return getattr(ImageEnhance, name.capitalize())(picture).enhance(1 + sign * size)
    if name == "posterize":
        return ImageOps.posterize(picture, int(size))
    if name == "solarize":
        return ImageOps.solarize(picture, size)  # type: ignore[arg-type]
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}[name](picture)


def autoaugment(picture: Any, generator: np.random.Generator) -> Any:
    """A sub-policy of `POLICY`, each with chance 1/25, on a PIL image (RGB); each of its two operations with its own probability.

    Draws: integers(25) for the row; then for each of its operations random() and, where that is below the probability and the operation
    has a sign, integers(2) (0: negative).
    """
    row = POLICY[int(generator.integers(len(POLICY)))]
    for chance, name, index in (row[:3], row[3:]):
        if generator.random() < chance:
            sign = 2 * int(generator.integers(2)) - 1 if name in SIGNED else 1
            picture = augmented(picture, name, index, sign)
    return picture
