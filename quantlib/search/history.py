"""What a search found after each epoch: bits, costs and losses, kept as JSON and drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlib.search.supernet import layers, read_bits


@dataclass(frozen=True)
class Entry:
    """One epoch. certainty: the largest share, averaged over layers: 1 when every layer has made up its mind."""

    epoch: int
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]
    certainty: float
    costs: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


class History:
    """Rows of a search, one per epoch: `add` reads them off the supernet, `save` and `load` keep them, `plot` draws them.

    names: of the searched layers, in order. entries: one `Entry` per epoch, in the order in which they were added.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.entries: list[Entry] = []

    def add(self, net: nn.Module, epoch: int, costs: Mapping[str, Any] | None = None, losses: Mapping[str, Any] | None = None) -> Entry:
        """Bits that the supernet has now, with the numbers given (tensors of one element are taken as numbers).

        ValueError when the supernet has other layers than before.
        """
        bits = read_bits(net)
        if self.entries and bits.names != self.names:
            raise ValueError(f"this history is of a supernet with the layers {', '.join(self.names)}")
        with torch.no_grad():
            sure = [float(m.shares().max()) for m in layers(net)] + [float(m.input_shares()[1].max()) for m in layers(net)]
        self.names = bits.names
        numbers = [{k: float(torch.as_tensor(v).detach()) for k, v in (given or {}).items()} for given in (costs, losses)]
        self.entries.append(Entry(epoch, bits.weight_bits, bits.act_bits, sum(sure) / len(sure), *numbers))
        return self.entries[-1]

    def save(self, path: str | Path) -> Path:
        """Write JSON under a temporary name, then rename."""
        target = Path(path)
        text = json.dumps({"layers": self.names, "epochs": [asdict(e) for e in self.entries]}, indent=1)
        unfinished = target.with_name(f".{target.name}")
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> History:
        """What `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        history = cls()
        history.names = tuple(content["layers"])
        for row in content["epochs"]:
            history.entries.append(Entry(**row | {k: tuple(row[k]) for k in ("weight_bits", "act_bits")}))
        return history

    def plot(self, path: str | Path) -> Path:
        """A picture: weight and activation bits of every layer over the epochs, and all costs and losses, each relative to its start."""
        from matplotlib.figure import Figure

        if not self.entries:
            raise ValueError("a history without an epoch has nothing to draw")
        epochs = [e.epoch for e in self.entries]
        figure = Figure(figsize=(8, 3 + 0.5 * len(self.names)), layout="constrained")
        axes = figure.subplots(3, 1, height_ratios=[len(self.names), len(self.names), 6])
        for panel, kind in zip(axes, ("weight_bits", "act_bits")):
            rows = [[getattr(e, kind)[layer] for e in self.entries] for layer in range(len(self.names))]
            image = panel.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=1, vmax=max(8, *map(max, rows)))
            panel.set(title=kind.replace("_", " "), yticks=range(len(self.names)), yticklabels=self.names)
            every = max(1, len(epochs) // 10)
            panel.set(xticks=range(0, len(epochs), every), xticklabels=epochs[::every])
            figure.colorbar(image, ax=panel)
        for group in ("costs", "losses"):
            for name in sorted({n for e in self.entries for n in getattr(e, group)}):
                points = [(e.epoch, getattr(e, group)[name]) for e in self.entries if name in getattr(e, group)]
                start = abs(points[0][1]) or 1.0
                axes[2].plot(
                    [x for x, _ in points], [y / start for _, y in points], "-o", ms=3, label=f"{name} ({points[0][1]:.4g} at first)"
                )
        axes[2].set(xlabel="epoch", ylabel="relative to the start")
        if axes[2].lines:
            axes[2].legend(fontsize=8)
        target = Path(path)
        unfinished = target.with_name(f".{target.name}")
        figure.savefig(unfinished, format=target.suffix.lstrip(".") or "png")
        os.replace(unfinished, target)
        return target
