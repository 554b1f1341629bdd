"""The detection head of UltraNet and SkyNet: what its 36 channels mean, its loss, and the box it answers with.

Channel 6 a + f of cell (row, column) is field f of anchor a: x, y, w, h, object, class. All six anchors are squares of 20 pixels. Rows of
targets are (image, class, x, y, w, h, weight), the box in shares of the image. Source: DeepBurning-MixQ, published training and test code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.training.detection.boxes import overlap

ANCHORS, FIELDS, ANCHOR = 6, 6, 20.0
BOX_GAIN, OBJECT_GAIN = 3.54, 64.3
LARGEST = 1e3  # bound of exp(w) and exp(h) in the loss


def cells(head: Tensor) -> Tensor:
    """(N, 36, ny, nx) -> (N, 6, ny, nx, 6): anchor, row, column, field. ValueError for another number of channels."""
    if head.dim() != 4 or head.shape[1] != ANCHORS * FIELDS:
        raise ValueError(f"a detection head is (N, {ANCHORS * FIELDS}, rows, columns), got {tuple(head.shape)}")
    n, _, ny, nx = head.shape
    return head.reshape(n, ANCHORS, FIELDS, ny, nx).permute(0, 1, 3, 4, 2)


def stride(head: Tensor, size: tuple[int, int]) -> float:
    """Pixels of an image of size (height, width) per cell: the longer side over the longer side of the grid."""
    return max(size) / max(head.shape[-2:])


def decode(head: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 36, ny, nx) -> (N, 6 ny nx, 6): x = (sigmoid(tx) + column) stride, y likewise, w = 20 exp(tw), h = 20 exp(th) in pixels;
    object and class through a sigmoid."""
    p = cells(head).float()
    n, _, ny, nx, _ = p.shape
    grid = torch.stack(torch.meshgrid(torch.arange(nx), torch.arange(ny), indexing="xy"), -1).to(p)
    centre = (p[..., :2].sigmoid() + grid) * stride(head, size)
    return torch.cat([centre, p[..., 2:4].exp() * ANCHOR, p[..., 4:].sigmoid()], -1).reshape(n, -1, FIELDS)


def best_boxes(head: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 36, ny, nx) -> (N, 5): x, y, w, h in pixels and the probability of an object, of the cell where the mean of that probability over
    the six anchors is largest (the first of equals); every field is the mean of the anchors' decoded ones."""
    n = len(head)
    means = decode(head, size).reshape(n, ANCHORS, -1, FIELDS).mean(1)
    return means[torch.arange(n, device=head.device), means[..., 4].argmax(1), :5]


def pixels(targets: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (rows, 4) in pixels of an image of size (height, width) from rows of targets."""
    return targets[:, 2:6] * targets.new_tensor((size[1], size[0], size[1], size[0]))


class BoxOverlap:
    """The metric as a score of `fit`: (N,) intersection over union of the answered box and the target of each image.

    An image without a target, as augmentation may leave it, has 0; of several targets the last counts.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.__qualname__ = f"BoxOverlap({size})"

    def __call__(self, head: Tensor, targets: Tensor) -> Tensor:
        answered = best_boxes(head, self.size)[:, :4]
        scores = answered.new_zeros(len(head))
        image = targets[:, 0].long()
        scores[image] = overlap(answered[image], pixels(targets.to(answered), self.size))
        return scores


class DetectionLoss(nn.Module):
    """scale (box + object), called with (head, targets, images).

    Each target is assigned to all six anchors of the cell it lies in; nothing is rejected by its overlap. In units of cells, box = 3.54
    mean(1 - CIoU) between (sigmoid(tx), sigmoid(ty), 20 min(exp(tw), 1000) / stride, 20 min(exp(th), 1000) / stride) and the target
    relative to its cell. object = 64.3 mean over all anchors and cells of u BCE(logit, t): t = 1 at assigned cells, u the label's weight
    on every cell of an image that holds a target (the last one's), else 1. There is one class, hence no loss of it. A target at x or y = 1
    belongs to the last cell. scale: published training multiplies by batch / 64.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, outputs: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        box, obj, _ = self.parts(outputs, labels, images)
        return self.scale * (box + obj)

    def parts(self, outputs: Tensor, labels: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(box, object, mean IoU): the first two with their gains, the last without gradient; box and IoU are 0 without targets."""
        p, targets = cells(outputs).float(), labels.float()
        n, anchors, ny, nx, _ = p.shape
        side = stride(outputs, (images.shape[-2], images.shape[-1]))
        image = targets[:, 0].long()
        place = targets[:, 2:4] * targets.new_tensor((nx, ny))
        column, row = place[:, 0].long().clamp(0, nx - 1), place[:, 1].long().clamp(0, ny - 1)

        wanted, weight = torch.zeros_like(p[..., 4]), torch.ones_like(p[..., 4])
        box, iou = p.new_zeros(()), p.new_zeros(())
        if len(targets):
            found = p[image, :, row, column]  # (targets, anchors, fields)
            answered = torch.cat([found[..., :2].sigmoid(), found[..., 2:4].exp().clamp(max=LARGEST) * (ANCHOR / side)], -1)
            true = torch.cat([place - torch.stack([column, row], 1), targets[:, 4:6] * targets.new_tensor((nx, ny))], 1)
            true = true[:, None].expand_as(answered)
            box = BOX_GAIN * (1 - overlap(answered, true, "ciou")).mean()
            iou = overlap(answered.detach(), true).mean()
            wanted[image, :, row, column] = 1.0
            for place_in_batch, value in zip(image.tolist(), targets[:, 6]):  # in order: the last target of an image wins
                weight[place_in_batch] = value
        obj = OBJECT_GAIN * F.binary_cross_entropy_with_logits(p[..., 4], wanted, weight)
        return box, obj, iou

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
