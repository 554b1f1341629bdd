"""Resizing and random changes of training pictures: uint8 (H, W, 3) RGB, boxes as (left, top, right, bottom) in pixels.

The published pipeline uses OpenCV; this one uses torch and gives the same up to rounding. Resizing takes the two nearest pixels along each
axis, half-pixel centres, as INTER_LINEAR_EXACT does: from 640x360 to 320x160 every weight is a multiple of 1/16, so the sum is exact and
only the rounding of halves (here up) remains; other sizes may differ by one level. Warping does not round positions to 1/32 of a pixel as
warpAffine does, and hue is not taken from tables of integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ranges:
    """What is random about a training picture; each value is drawn evenly from the range.

    degrees: rotation about the centre, +-. scale: 1 +- this. shift: x by +- this times the height, y by +- this times the width (the
    published code swaps the two). shear: angle of both shears in degrees, +-. hue, saturation, value: factors 1 +- this. border: level
    that enters.
    """

    degrees: float = 1.98
    scale: float = 0.05
    shift: float = 0.05
    shear: float = 0.641
    hue: float = 0.0138
    saturation: float = 0.678
    value: float = 0.36
    border: int = 128


PUBLISHED = Ranges()


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (*size, 3), bilinear between the two nearest pixels, the aspect not kept."""
    if pixels.shape[:2] == size:
        return pixels
    x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].double()
    y = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
    return (y[0] + 0.5).floor().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def affine(size: tuple[int, int], ranges: Ranges, generator: np.random.Generator) -> np.ndarray:
    """(3, 3): M = Shear Translation Rotation, from pixels of the picture to pixels of the changed one."""
    height, width = size
    angle, scale = math.radians(generator.uniform(-ranges.degrees, ranges.degrees)), generator.uniform(1 - ranges.scale, 1 + ranges.scale)
    shift_x, shift_y = generator.uniform(-ranges.shift, ranges.shift, 2) * (height, width)
    shear_x, shear_y = np.tan(np.radians(generator.uniform(-ranges.shear, ranges.shear, 2)))
    a, b, cx, cy = scale * math.cos(angle), scale * math.sin(angle), width / 2, height / 2
    rotation = np.array([[a, b, (1 - a) * cx - b * cy], [-b, a, b * cx + (1 - a) * cy], [0, 0, 1]])
    translation = np.array([[1, 0, shift_x], [0, 1, shift_y], [0, 0, 1]])
    shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    return shear @ translation @ rotation


def warped(pixels: np.ndarray, matrix: np.ndarray, border: int) -> np.ndarray:
    """uint8 (H, W, 3) -> the same shape: pixel p of the result is the picture at matrix^-1 p, bilinear; `border` outside."""
    height, width = pixels.shape[:2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inverse = torch.from_numpy(np.linalg.inv(matrix)).float()
    x, y = (inverse[k, 0] * columns + inverse[k, 1] * rows + inverse[k, 2] for k in (0, 1))
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    picture = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() - border
    moved = F.grid_sample(picture, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved[0] + (border + 0.5)).floor().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def warped_box(box: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """The upright box around the four moved corners, cut at the picture's edges; None where too little of it is left.

    Kept are boxes wider and higher than 3 pixels, of more than 0.2 of their old area, and with sides below 10 : 1.
    """
    left, top, right, bottom = box
    x, y, _ = matrix @ np.array([[left, right, left, right], [top, bottom, bottom, top], [1, 1, 1, 1]])
    new = np.array([x.min(), y.min(), x.max(), y.max()])
    new[[0, 2]], new[[1, 3]] = new[[0, 2]].clip(0, size[1]), new[[1, 3]].clip(0, size[0])
    w, h = new[2] - new[0], new[3] - new[1]
    old = (right - left) * (bottom - top)
    kept = w > 3 and h > 3 and w * h > 0.2 * old and max(w, h) < 10 * min(w, h)
    return new if kept else None


def to_hsv(pixels: np.ndarray) -> np.ndarray:
    """uint8 RGB -> uint8 hue (0..179, half degrees), saturation, value (0..255), each rounded."""
    rgb = pixels.astype(np.float32)
    value, low = rgb.max(-1), rgb.min(-1)
    spread = value - low
    safe = np.where(spread == 0, 1, spread)
    r, g, b = np.moveaxis(rgb, -1, 0)
    turn = np.where(value == r, (g - b) / safe, np.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = np.rint(30 * turn % 180) % 180
    saturation = np.rint(255 * spread / np.where(value == 0, 1, value))
    return np.stack([hue, saturation, value], -1).astype(np.uint8)


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """The inverse of `to_hsv` up to rounding."""
    hue, saturation, value = np.moveaxis(hsv.astype(np.float32), -1, 0)
    sector = (hue[..., None] / 30 + np.array([5, 3, 1], np.float32)) % 6
    share = np.minimum(sector, 4 - sector).clip(0, 1)
    return np.rint(value[..., None] * (1 - saturation[..., None] / 255 * share)).astype(np.uint8)


def recoloured(pixels: np.ndarray, ranges: Ranges, generator: np.random.Generator) -> np.ndarray:
    """Hue, saturation and value times 1 + U(-1, 1) of their ranges, cut at 179, 255, 255 and truncated."""
    gains = 1 + generator.uniform(-1, 1, 3) * (ranges.hue, ranges.saturation, ranges.value)
    return from_hsv(np.minimum(to_hsv(pixels) * gains.astype(np.float32), (179, 255, 255)).astype(np.uint8))


def augmented(
    pixels: np.ndarray, box: np.ndarray, flip: bool, ranges: Ranges, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """The published order: warp, colours, left-right flip in half of the cases. The box is None where the warp left too little of it."""
    size = pixels.shape[:2]
    matrix = affine((size[0], size[1]), ranges, generator)
    pixels, moved = warped(pixels, matrix, ranges.border), warped_box(box, matrix, (size[0], size[1]))
    pixels = recoloured(pixels, ranges, generator)
    if flip and generator.random() < 0.5:
        pixels = pixels[:, ::-1]
        moved = None if moved is None else np.array([size[1] - moved[2], moved[1], size[1] - moved[0], moved[3]])
    return pixels, moved


def as_input(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) RGB -> float32 (3, H, W) in the published order blue, green, red, level / 256."""
    return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1].transpose(2, 0, 1))).float() / 256
