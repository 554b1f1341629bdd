"""A training loop for small networks: Adam, a learning rate that falls linearly to zero, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.training.data import Images
from quantlib.training.metrics import accuracy, predictions


@dataclass(frozen=True)
class Fit:
    """Settings of one run. shift: largest random displacement of an image in pixels; gate_target and gate_decay: the pull of every

    convolution's gating threshold T, gate_decay / 2 * |T - gate_target|^2 (FracBNN's only regularisation of its gates).
    """

    epochs: int
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    shift: int = 0
    gate_target: float = 0.0
    gate_decay: float = 1e-5
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    number: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    lr: float
    seconds: float


def gate_pull(model: nn.Module, target: float, decay: float) -> Tensor:
    """decay / 2 * sum over gating thresholds T of |T - target|^2."""
    gates = [p for name, p in model.named_parameters() if name.endswith(".threshold")]
    return decay / 2 * torch.stack([((g - target) ** 2).sum() for g in gates]).sum() if gates else torch.zeros(())


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Every image moved by its own random offset of up to `most` pixels, zeros entering: (N, C, H, W) -> same."""
    n, _, height, width = x.shape
    padded = F.pad(x, (most,) * 4)
    offsets = torch.randint(0, 2 * most + 1, (n, 2), generator=generator)
    rows = offsets[:, 0, None] + torch.arange(height)
    columns = offsets[:, 1, None] + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fit(
    model: nn.Module,
    train: Images,
    test: Images,
    settings: Fit,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    title: str = "training",
) -> list[Epoch]:
    """Trains in place and returns one row per epoch. The same settings on the same machine give the same weights."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / settings.epochs)
    rows: list[Epoch] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=settings.epochs, note="")
        for number in range(1, settings.epochs + 1):
            start, total, right = time.perf_counter(), 0.0, 0
            model.train()
            for x, y in train.batches(settings.batch, torch.randperm(len(train), generator=generator)):
                x = shifted(x, settings.shift, generator) if settings.shift else x
                out = model(x)
                value = loss(out, y)
                optimizer.zero_grad(set_to_none=True)
                (value + gate_pull(model, settings.gate_target, settings.gate_decay)).backward()
                optimizer.step()
                total += float(value.detach()) * len(y)
                right += int((out.detach().argmax(1) == y).sum())
            lr = float(schedule.get_last_lr()[0])
            schedule.step()
            score = accuracy(predictions(model, test), test.labels)
            rows.append(Epoch(number, total / len(train), right / len(train), score, lr, time.perf_counter() - start))
            progress.update(task, advance=1, note=f"loss {rows[-1].loss:.3f}  test {100 * score:.1f} %")
    return rows
