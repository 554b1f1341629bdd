"""Losses: modules called with (outputs, labels, images), and penalties on parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.io.checkpoints import load


class CrossEntropy(nn.Module):
    """Mean over the batch of -log softmax(outputs)[label]; smoothing spreads that share of the target over all classes."""

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, outputs: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, label_smoothing=self.smoothing)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}"


class Distillation(nn.Module):
    """(1 - label_weight) t^2 D(softmax(teacher / t), softmax(outputs / t)) + label_weight * cross entropy, means over the batch.

    D(p, q): form "divergence" is sum_c p_c log(p_c / q_c), form "cross entropy" is - sum_c p_c log q_c; they differ by the entropy of p,
    which has no gradient. Gradient of either to the outputs at t = 1, without labels: (softmax(outputs) - p) / batch.
    teacher: any module of images, frozen here; mode "eval" uses its running statistics, "train" those of the batch (as the published
    scripts of FracBNN and DiracDeltaNet, where train() on the whole model reaches the teacher).
    Source: Hinton et al., arXiv 1503.02531; FracBNN: t = 1, no labels. Label refinery (Bagherinezhad et al., arXiv 1805.02641), as
    DiracDeltaNet uses it: t = 1, no labels, form "cross entropy".
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float = 1.0,
        label_weight: float = 0.0,
        mode: Literal["eval", "train"] = "eval",
        form: Literal["divergence", "cross entropy"] = "divergence",
    ) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False).train(mode == "train")
        self.temperature, self.label_weight, self.mode, self.form = temperature, label_weight, mode, form

    def forward(self, outputs: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.softmax(self.teacher(images).float() / self.temperature, 1)
        outputs = outputs.float()
        if self.form == "cross entropy":
            loss = F.cross_entropy(outputs / self.temperature, target)
        else:
            loss = F.kl_div(F.log_softmax(outputs / self.temperature, 1), target, reduction="batchmean")
        loss = loss * self.temperature**2
        if self.label_weight:
            loss = (1 - self.label_weight) * loss + self.label_weight * F.cross_entropy(outputs, labels)
        return loss

    def __repr__(self) -> str:
        name = type(self.teacher).__name__
        settings = f"temperature={self.temperature}, label_weight={self.label_weight}, mode={self.mode!r}, form={self.form!r}"
        return f"Distillation({name}, {settings})"


def load_teacher(name: str, weights: str | Path, classes: int = 1000) -> nn.Module:
    """A torchvision classifier by name, with the weights of a file the user gives, in any form `zoo.load` reads; no code in it is run.

    CheckpointError, with what differs, where the file does not fit.
    """
    from torchvision.models import get_model

    return load(get_model(name, weights=None, num_classes=classes), weights)


def gate_pull(model: nn.Module, target: float, decay: float) -> Tensor:
    """decay / 2 * sum over trained gating thresholds T of |T - target|^2 (FracBNN's only regularisation of its gates)."""
    gates = [p for name, p in model.named_parameters() if name.endswith("threshold") and p.requires_grad]
    return decay / 2 * torch.stack([((g - target) ** 2).sum() for g in gates]).sum() if gates else torch.zeros(())
