"""The training loop of every recipe: plain, on one process or on several started by `accelerate launch`.

Everything random in a step follows from (seed, epoch, step), never from what ran before: order and augmentation of the images, and torch's,
numpy's and Python's generators, which are seeded anew before each step. A checkpoint therefore holds weights, optimizer state, sums of the
epoch so far and the position; a run continued from it repeats the uninterrupted one bit by bit wherever the machine's arithmetic is
reproducible (on CPU it is, for a fixed number of threads). Several processes share each batch; gradients and metrics are means over all of
it, batch normalisation sees the share of its process, and the running statistics are those of process 0.
"""

from __future__ import annotations

import atexit
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.training.average import MovingAverage
from quantlib.training.checkpoint import CheckpointError, load_checkpoint, pick, save_checkpoint, write_bytes
from quantlib.training.data import Augment, Data
from quantlib.training.logs import Bar, Epoch, Logs
from quantlib.training.losses import CrossEntropy, gate_pull
from quantlib.training.metrics import Score, evaluating, right_answers
from quantlib.training.optim import (
    Adam,
    Course,
    EachStep,
    Group,
    Linear,
    Optimizer,
    Schedule,
    optimizer_state,
    restore_optimizer,
    split_parameters,
    torch_groups,
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""


@dataclass(frozen=True)
class Fit:
    """Settings of one run.

    batch: images per step over all processes together; images: per epoch, a fresh random choice each time (0: all); drop_last: leave out
    the last, smaller batch. shift, flip: augmentation (`Augment`). gate_target, gate_decay: the pull of every gating threshold T,
    gate_decay / 2 * |T - gate_target|^2. precision: "bf16" and "fp16" run the convolutions in it; the quantizers of this library stay in
    float32. compile: torch.compile (slower on CPU; sums in another order, so other last digits). channels_last: memory layout, much faster
    on CPU. groups: parameters with settings of their own. batches: (first epoch, images per step) of later epochs that have another batch.
    average: decay of a `MovingAverage` of the weights, which then is what is tested and what best.safetensors holds (0: none). save_every:
    steps between checkpoints (0: only after each epoch). workers:
    processes that decode image files.
    """

    epochs: int
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    shift: int = 0
    flip: bool = False
    gate_target: float = 0.0
    gate_decay: float = 1e-5
    seed: int = 0
    images: int = 0
    drop_last: bool = False
    optimizer: Optimizer = Adam()
    schedule: Schedule = Linear()
    groups: tuple[Group, ...] = ()
    batches: tuple[tuple[int, int], ...] = ()
    average: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    channels_last: bool = False
    save_every: int = 0
    workers: int = 0
    tensorboard: bool = False


_FREE = {"save_every", "workers", "tensorboard"}  # settings that do not change the numbers


def fit(
    model: nn.Module,
    train: Data,
    test: Data,
    settings: Fit,
    loss: nn.Module | None = None,
    title: str = "training",
    out: str | Path | None = None,
    resume: bool = False,
    score: Score = right_answers,
    note: Callable[[], dict[str, Any]] | None = None,
    also: Mapping[str, Score] | None = None,
    each_epoch: Callable[[Sequence[Epoch]], None] | None = None,
    trained_as: nn.Module | None = None,
) -> list[Epoch]:
    """Trains in place and returns one row per epoch. The same settings on the same machine give the same weights.

    loss: called with (outputs, labels, images), by default `CrossEntropy()`. score: called with (outputs, labels), one number in [0, 1] per
    image; its mean stands where an accuracy is named. note: called after each epoch's training; its JSON facts stand in the row.
    also: further such functions (any range) by name; their means stand in `Epoch.more`. each_epoch: called in the main process with all
    rows after each epoch. trained_as: a module around the model, without parameters of its own, that is called in its place while training
    (`DropoutSamples`, `MixedImages`); the model itself is tested and saved.
    out: folder for last.safetensors (all a resumed run needs), best.safetensors (weights of the best test accuracy, the latest among
    equals) with best.json, log.csv, speed.csv, TensorBoard events; None: nothing is written. resume: continue from last.safetensors where
    there is one; otherwise an old one is removed. The model is left on the device it came from, with its last weights. TrainingError when
    the loss is not finite, CheckpointError when a checkpoint belongs to other settings.
    """
    return _Run(
        model,
        train,
        test,
        settings,
        loss or CrossEntropy(),
        title,
        Path(out) if out else None,
        score,
        note,
        also or {},
        each_epoch,
        trained_as or model,
    ).run(resume)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        train: Data,
        test: Data,
        settings: Fit,
        loss: nn.Module,
        title: str,
        out: Path | None,
        score: Score,
        note: Callable[[], dict[str, Any]] | None,
        also: Mapping[str, Score],
        each_epoch: Callable[[Sequence[Epoch]], None] | None,
        trained_as: nn.Module,
    ) -> None:
        from accelerate import Accelerator

        self.bare, self.train, self.test, self.settings, self.title, self.out = model, train, test, settings, title, out
        self.attributes = set(vars(model))
        self.home = next(model.parameters()).device
        self.accelerator = Accelerator(mixed_precision=settings.precision)
        self.rank, self.world, self.device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        for size in (settings.batch, *(batch for _, batch in settings.batches)):
            if size % self.world:
                raise TrainingError(f"a batch of {size} images does not split evenly over {self.world} processes")
        self.loss, self.score, self.note, self.each_epoch = loss.to(self.device), score, note, each_epoch
        self.also = dict(also)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.to(self.device)
        self.average = MovingAverage(model, settings.average) if settings.average else None
        parts = split_parameters(((name, p) for name, p in model.named_parameters() if p.requires_grad), settings.groups)
        self.groups = [group for group, _ in parts]
        optimizer = settings.optimizer.build(torch_groups(parts), settings.lr, settings.weight_decay)
        self.momenta = [group.get("momentum", 0.0) for group in optimizer.param_groups]
        self.trained_as = "" if trained_as is model else repr(trained_as)
        self.model, self.optimizer = self.accelerator.prepare(torch.compile(trained_as) if settings.compile else trained_as, optimizer)
        self.rows: list[Epoch] = []
        self.epoch, self.step, self.seconds, self.best = 0, 0, 0.0, -1.0
        self.sums = torch.zeros(3 + len(also), dtype=torch.float64)  # loss, score, images, further: of this process, in this epoch

    def run(self, resume: bool) -> list[Epoch]:
        settings = self.settings
        if resume and self.out and (self.out / "last.safetensors").is_file():
            self._load(self.out / "last.safetensors")
        elif self.out and self.accelerator.is_main_process:
            (self.out / "last.safetensors").unlink(missing_ok=True)  # of an older run: a kill before the first save must not revive it
        logs = Logs(self.out if self.accelerator.is_main_process else None, self.rows, settings.tensorboard)
        with Bar(self.title, settings.epochs, self.accelerator.is_main_process) as self.bar:
            while self.epoch < settings.epochs:
                row = self._one_epoch()
                self.rows.append(row)
                logs.add(row)
                self.bar.row(row)
                if self.each_epoch and self.accelerator.is_main_process:
                    self.each_epoch(self.rows)
                self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
                self.sums.zero_()
                if row.test_accuracy >= self.best:
                    self.best = row.test_accuracy
                    self._save_best(row)
                self._save()
        logs.close()
        self.accelerator.wait_for_everyone()
        for name in vars(self.bare).keys() - self.attributes:  # accelerate's mixed-precision forward
            delattr(self.bare, name)
        self.bare.to(self.home)
        if settings.channels_last:
            self.bare.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return self.rows

    def _one_epoch(self) -> Epoch:
        from accelerate.utils import broadcast

        settings, started = self.settings, time.perf_counter() - self.seconds
        batches = self._batches()
        mine = [rows[self.rank :: self.world] for rows in batches[self.step :]]
        augment = Augment(settings.shift, settings.flip)
        self.model.train()
        self.bar.epoch(self.epoch + 1, len(batches), self.step)
        known = len(self.train.unreadable)
        for x, y in self.train.read(mine, augment, (settings.seed, self.epoch), settings.workers):
            self._set_rates(len(batches))
            self._one_step(x, y, len(batches[self.step]))
            self.step += 1
            if self.average:
                self.average.update(self.epoch * len(batches) + self.step)
            self.seconds = time.perf_counter() - started
            self.bar.step()
            known = self._report_unreadable(self.train, known)
            if settings.save_every and self.step % settings.save_every == 0 and self.step < len(batches):
                self._save()
        total, right, count, *further = self._check(self._of_all(self.sums).sum(0).tolist())
        if self.world > 1:  # running statistics of process 0 are the model's, as in DistributedDataParallel's forward
            for buffer in self.bare.buffers():
                buffer.copy_(broadcast(buffer))
            for shadow in self.average.shadow.values() if self.average else ():
                shadow.copy_(broadcast(shadow))
        notes = self.note() if self.note else {}
        with self._tested():
            score, *measured = self._test_scores()
        more = {f"train {name}": value / count for name, value in zip(self.also, further, strict=True)}
        more |= {f"test {name}": value for name, value in zip(self.also, measured, strict=True)}
        lr = settings.lr * self._factor(settings.schedule, 0, len(batches))
        return Epoch(self.epoch + 1, total / count, right / count, score, lr, int(count), self.seconds, notes, more)

    def _tested(self) -> AbstractContextManager[None]:
        """Within it the model has the weights that are tested and kept."""
        return self.average.applied() if self.average else nullcontext()

    def _factor(self, schedule: Schedule, step: int, steps: int) -> float:
        """Of this epoch, or of this step of its `steps`."""
        if isinstance(schedule, Course):
            return schedule.within(self.epoch, (step + 1) / steps, self.settings.epochs)
        if isinstance(schedule, EachStep):
            return schedule.factor(self.epoch * steps + step, self.settings.epochs * steps)
        return schedule.factor(self.epoch, self.settings.epochs)

    def _set_rates(self, steps: int) -> None:
        """Learning rate and momentum of the coming step, for every group."""
        settings = self.settings
        for group, ours, momentum in zip(self.optimizer.param_groups, self.groups, self.momenta, strict=True):
            factor = self._factor(ours.schedule or settings.schedule, self.step, steps)
            group["lr"] = (settings.lr if ours.lr is None else ours.lr) * factor
            if "momentum" in group:
                group["momentum"] = momentum * self._factor(ours.momentum_schedule, self.step, steps)

    def _batches(self) -> list[Tensor]:
        """Indices of each step, of all processes together."""
        settings, n = self.settings, len(self.train)
        size = next((batch for first, batch in reversed(settings.batches) if first <= self.epoch), settings.batch)
        order = torch.from_numpy(np.random.default_rng([settings.seed, self.epoch, 0]).permutation(n))[: settings.images or n]
        batches = [rows for rows in order.split(size) if len(rows) >= (size if settings.drop_last else self.world)]
        if not batches:
            raise TrainingError(f"{self.train.name} has {len(order)} images, fewer than one batch of {size}")
        return batches

    def _one_step(self, x: Tensor, y: Tensor, together: int) -> None:
        settings = self.settings
        _seed_everything(settings.seed, self.epoch, self.step, self.rank)
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if settings.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        out = self.model(x)
        with self.accelerator.autocast():
            value = self.loss(out, y, x)
        share = len(x) * self.world / together  # processes average their gradients: weighted so, they give the mean over all images
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(value * share + gate_pull(self.bare, settings.gate_target, settings.gate_decay))
        self.optimizer.step()
        right, *further = (score(out.detach(), y).double().sum() for score in (self.score, *self.also.values()))
        self.sums += torch.stack([value.detach().double() * len(x), right, right.new_tensor(len(x)), *further]).cpu()

    def _test_scores(self) -> list[float]:
        """Means of the score and of the further ones over readable images; each process takes its share, and the counts are added."""
        counts = torch.zeros(2 + len(self.also), dtype=torch.float64)
        known = len(self.test.unreadable)
        chunks = torch.arange(self.rank, len(self.test), self.world).split(self.settings.batch)
        with evaluating(self.bare):
            for x, y in self.test.read(chunks, None, (self.settings.seed, self.epoch), self.settings.workers):
                if self.settings.channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                with self.accelerator.autocast():
                    out = self.bare(x.to(self.device))
                right, *further = (score(out, y.to(self.device)).double().sum() for score in (self.score, *self.also.values()))
                counts += torch.stack([right, right.new_tensor(len(x)), *further]).cpu()
                known = self._report_unreadable(self.test, known)
        right, images, *further = self._of_all(counts).sum(0).tolist()
        return [value / max(images, 1.0) for value in (right, *further)]

    def _of_all(self, counts: Tensor) -> Tensor:
        """(processes, ...): this tensor from every process."""
        return self.accelerator.gather(counts.to(self.device)[None]).cpu() if self.world > 1 else counts[None]

    def _report_unreadable(self, data: Data, known: int) -> int:
        for path in list(data.unreadable)[known:]:
            self.bar.warn(f"unreadable, left out: {path} ({data.unreadable[path]})")
        return len(data.unreadable)

    def _check(self, sums: list[float]) -> list[float]:
        if not math.isfinite(sums[0]):
            place = f"in epoch {self.epoch + 1}, at step {self.step}"
            raise TrainingError(f"{self.title}: the loss is {sums[0]} {place}; lower lr or check the data")
        return sums

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to continue this run."""
        settings = {k: v for k, v in asdict(self.settings).items() if k not in _FREE}
        kinds: dict[str, Any] = {k: type(getattr(self.settings, k)).__name__ for k in ("optimizer", "schedule")}
        kinds |= {"groups": repr(self.settings.groups)} if self.settings.groups else {}
        kinds |= {"also": list(self.also)} if self.also else {}
        kinds |= {"trained_as": self.trained_as} if self.trained_as else {}
        kinds |= {"score": self.score.__qualname__} if self.score is not right_answers else {}
        facts: dict[str, Any] = {"settings": settings, "kinds": kinds, "loss": repr(self.loss), "processes": self.world}
        facts |= {k: f"{data.name}, {len(data)} images" for k, data in (("train", self.train), ("test", self.test))}
        return json.loads(json.dumps(facts))

    def _save(self) -> None:
        sums = self._of_all(self.sums)
        if not (self.out and self.accelerator.is_main_process):
            return
        self._check(sums.sum(0).tolist())
        state, plain = optimizer_state(self.optimizer.optimizer)
        tensors = {f"model/{k}": v for k, v in self.bare.state_dict().items()} | {f"optimizer/{k}": v for k, v in state.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.shadow.items()} if self.average else {}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        facts = {
            "run": self._identity(), "epoch": self.epoch, "step": self.step, "best": self.best, "seconds": self.seconds,
            "optimizer": plain, "scaler": scaler, "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip
        save_checkpoint(self.out / "last.safetensors", tensors | {"sums": sums}, facts)

    def _save_best(self, row: Epoch) -> None:
        if self.out and self.accelerator.is_main_process:
            facts = {"epoch": row.number, "accuracy": row.test_accuracy, "notes": row.notes, "run": self._identity()}
            with self._tested():
                save_checkpoint(self.out / "best.safetensors", dict(self.bare.state_dict()), facts)
            write_bytes(self.out / "best.json", (json.dumps(facts, indent=1) + "\n").encode())

    def _load(self, path: Path) -> None:
        tensors, facts = load_checkpoint(path)
        ours, theirs = self._identity(), facts["run"]
        defaults = json.loads(json.dumps(asdict(Fit(0))))  # of settings that an older checkpoint does not know
        flat = {k: (theirs["settings"].get(k, defaults[k]), v) for k, v in ours["settings"].items()}
        flat |= {k: (theirs.get(k), v) for k, v in ours.items() if k != "settings"}
        different = [f"{k} was {was!r}, now {now!r}" for k, (was, now) in flat.items() if was != now]
        if different:
            raise CheckpointError(f"{path} belongs to another run: {'; '.join(different)}. Give the same settings, or start without resume")
        self.bare.load_state_dict(pick(tensors, "model/"))
        for name, shadow in self.average.shadow.items() if self.average else ():
            shadow.copy_(tensors[f"average/{name}"])
        restore_optimizer(self.optimizer.optimizer, pick(tensors, "optimizer/"), facts["optimizer"])
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.sums = tensors["sums"][self.rank].clone()
        self.epoch, self.step, self.best, self.seconds = facts["epoch"], facts["step"], facts["best"], facts["seconds"]
        self.rows = [Epoch(**row) for row in facts["rows"]]


def processes() -> Any:
    """accelerate's PartialState, as `fit` will see it: num_processes, local_process_index, wait_for_everyone(). It may be asked before."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@atexit.register
def _leave_group() -> None:
    """A group of processes that is still up while the interpreter goes down can abort its process after all work is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_main_process() -> bool:
    """True in the one process that writes and converts, of those that `accelerate launch` started."""
    return bool(processes().is_main_process)


def _seed_everything(*position: int) -> None:
    """torch (every device), numpy and Python, from a position of the run."""
    from accelerate.utils import set_seed

    set_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))
