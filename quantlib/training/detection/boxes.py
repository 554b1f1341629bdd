"""Overlap of boxes in its four published forms. Boxes are (..., 4): x and y of the centre, width, height, in any one unit."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-16  # added to unions and to the squared diagonal, as published
Kind = Literal["iou", "giou", "diou", "ciou"]


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre form -> (..., 4) left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def overlap(a: Tensor, b: Tensor, kind: Kind = "iou") -> Tensor:
    """(...,): intersection over union of boxes a and b, minus what its kind subtracts.

    giou: (c - union) / c with c the area of the smallest box around both. diou: rho^2 / d^2, squared distance of the centres over squared
    diagonal of that box. ciou: rho^2 / d^2 + alpha v with v = 4 / pi^2 (atan(wb / hb) - atan(wa / ha))^2 and alpha = v / (1 - iou + v),
    which carries no gradient. alpha is 0 where it reads 0 / 0, at two equal boxes (published code: NaN there, which would end a training).

    >>> one, other = torch.tensor([2.0, 2.0, 4.0, 4.0]), torch.tensor([4.0, 2.0, 4.0, 4.0])
    >>> [round(float(overlap(one, other, kind)), 4) for kind in ("iou", "giou", "diou", "ciou")]
    [0.3333, 0.3333, 0.2564, 0.2564]
    """
    ca, cb = corners(a), corners(b)
    sides = (torch.minimum(ca[..., 2:], cb[..., 2:]) - torch.maximum(ca[..., :2], cb[..., :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = (a[..., 2] * a[..., 3] + EPS) + b[..., 2] * b[..., 3] - shared
    iou = shared / union
    if kind == "iou":
        return iou
    around = torch.maximum(ca[..., 2:], cb[..., 2:]) - torch.minimum(ca[..., :2], cb[..., :2])
    if kind == "giou":
        area = around[..., 0] * around[..., 1] + EPS
        return iou - (area - union) / area
    diagonal = around.square().sum(-1) + EPS
    distance = ((cb - ca)[..., :2] + (cb - ca)[..., 2:]).square().sum(-1) / 4
    if kind == "diou":
        return iou - distance / diagonal
    v = (4 / math.pi**2) * (torch.atan(b[..., 2] / b[..., 3]) - torch.atan(a[..., 2] / a[..., 3])).square()
    with torch.no_grad():
        alpha = torch.where(v == 0, 0.0, v / ((1 - iou).clamp(min=0) + v))  # iou may round to above 1
    return iou - (distance / diagonal + alpha * v)
