"""What a run leaves to look at: log.csv, speed.csv, TensorBoard events, and a progress bar."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantlib.training.checkpoint import write_bytes


@dataclass(frozen=True)
class Epoch:
    """One row of a run. loss and train_accuracy: means over the epoch, measured while training; lr: of this epoch; images: trained on.

    The accuracies are means of the run's score: right answers unless it has another one. notes: JSON facts of the run's own. more: means of
    its further scores, as "train <name>" and "test <name>". lr of a schedule that changes it with each step: at the first one.
    """

    number: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    lr: float
    images: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


_EXACT = ("number", "loss", "train_accuracy", "test_accuracy", "lr", "images")


class Logs:
    """Rewrites both CSV files whole after each epoch, so that they hold the rows of the checkpoint and nothing that was lost with a kill.

    log.csv is the same for the same run, killed or not; what a clock says is in speed.csv. TensorBoard's events are purged on resuming.
    """

    def __init__(self, folder: Path | None, rows: Sequence[Epoch], tensorboard: bool) -> None:
        self.folder, self.rows, self.events = folder, list(rows), None
        if folder is None:
            return
        self._write()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=len(self.rows) + 1)  # type: ignore[no-untyped-call, no-redef]

    def add(self, row: Epoch) -> None:
        self.rows.append(row)
        if self.folder:
            self._write()
        if self.events:
            shown = ("loss", "train_accuracy", "test_accuracy", "lr", "images_per_second")
            for name, value in ({name: getattr(row, name) for name in shown} | row.more).items():
                self.events.add_scalar(name, value, row.number)
            self.events.flush()

    def close(self) -> None:
        if self.events:
            self.events.close()

    def _write(self) -> None:
        assert self.folder is not None
        more = list(self.rows[-1].more) if self.rows else []
        exact = [[asdict(row)[name] for name in _EXACT] + [row.more[name] for name in more] for row in self.rows]
        speed = [[row.number, f"{row.seconds:.2f}", f"{row.images_per_second:.1f}"] for row in self.rows]
        write_bytes(self.folder / "log.csv", _csv([[*_EXACT, *more], *exact]))
        write_bytes(self.folder / "speed.csv", _csv([["number", "seconds", "images_per_second"], *speed]))


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


class Bar:
    """A progress bar over the steps of an epoch on a terminal, one line per epoch elsewhere; nothing where shown is False."""

    def __init__(self, title: str, epochs: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.title, self.epochs, self.shown, self.console = title, epochs, shown, Console()
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
        self.progress = Progress(*columns, console=self.console, disable=not (shown and self.console.is_terminal))
        self.task = self.progress.add_task(title, total=None, note="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def epoch(self, number: int, steps: int, done: int) -> None:
        self.progress.reset(self.task, total=steps, completed=done, description=f"{self.title} {number}/{self.epochs}")

    def step(self) -> None:
        self.progress.advance(self.task)

    def row(self, row: Epoch) -> None:
        scores = f"loss {row.loss:.3f}  train {100 * row.train_accuracy:.1f} %  test {100 * row.test_accuracy:.1f} %"
        note = f"{scores}  {row.images_per_second:.0f} images/s"
        self.progress.update(self.task, note=note)
        if self.shown and not self.console.is_terminal:
            self.console.print(f"{self.title} {row.number}/{self.epochs}  {note}", highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(text, style="yellow", highlight=False, soft_wrap=True)
