"""What the recipes of DeepBurning-MixQ share: published class names, the loss of a search, bits of a finished search, results.csv."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantlib as ql
import zoo
from quantlib.io.checkpoints import read, torch_content
from quantlib.io.mixq_export import MixqExportError, extract, write
from quantlib.io.mixq_simulation import differences, simulate
from quantlib.search import costs
from quantlib.training.checkpoint import load_checkpoint, write_bytes
from quantlib.training.deploy import Seconds, finish
from quantlib.training.logs import Epoch
from quantlib.training.report import figure_file, table, text

ALPHAS = r"alpha_(weight|activ)$"  # names of a supernet's parameters that choose the bits


@dataclass(frozen=True)
class Known:
    """A network of the zoo and its options, as a published class name means it. real: the form without quantizers."""

    network: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def real(self) -> bool:
        return self.options.get("quantizer") == "float"


def known(classes: Mapping[str, Known], name: str, width: float = 1.0) -> Known:
    """What a published class name means, with `width` as factor on the channels. Case, `_` and the suffixes _FixQ and _MixQ do not matter.
    SystemExit lists the names that would have worked."""

    def plain(word: str) -> str:
        return word.replace("_", "").lower().removesuffix("fixq").removesuffix("mixq")

    found = {plain(key): value for key, value in classes.items()}
    if plain(name) not in found:
        raise SystemExit(f"--model {name}: there are {', '.join(classes)}; _MixQ or _FixQ may follow")
    kind = found[plain(name)]
    return kind if width == 1 else Known(kind.network, dict(kind.options) | {"width": width})


def build(kind: Known, bitw: str = "", bita: str = "") -> nn.Module:
    """The network; without bits in its default setting. SystemExit says what is wrong with the bits."""
    bits = {key: value for key, value in (("weight_bits", bitw), ("act_bits", bita)) if value}
    try:
        return zoo.get(kind.network, **(dict(kind.options) | bits))
    except ValueError as error:
        raise SystemExit(f"{kind.network}: {error}") from error


class Priced(nn.Module):
    """task(outputs, labels, images) + gain sum_k decay_k price_k, prices being scalars of the supernet's alphas.

    prices: name -> (decay, function without arguments). Source: DeepBurning-MixQ, loss of the search (gain 1 for CIFAR-10, 4 batch / 64 for
    detection).
    """

    def __init__(self, task: nn.Module, prices: Mapping[str, tuple[float, Callable[[], Tensor]]], gain: float = 1.0) -> None:
        super().__init__()
        self.task, self.prices, self.gain = task, dict(prices), gain

    def forward(self, outputs: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        value: Tensor = self.task(outputs, labels, images)
        for decay, price in self.prices.values():
            if decay:
                value = value + self.gain * decay * price()
        return value

    def __repr__(self) -> str:
        return f"Priced({self.task!r}, { ({name: decay for name, (decay, _) in self.prices.items()}) }, gain={self.gain})"


def prices(net: nn.Module, cd: float, cdt: float, bd: float) -> dict[str, tuple[float, Callable[[], Tensor]]]:
    """The three published prices of a supernet with their decays, for `Priced`."""
    decays = {"complexity": cd, "complexity_trivial": cdt, "bram": bd}
    return {name: (decay, partial(getattr(costs, name), net)) for name, decay in decays.items()}


def found_so_far(net: nn.Module) -> dict[str, Any]:
    """Of a supernet, for an epoch's row: the bits with the largest shares, the published figures, and what its history draws."""
    history = ql.search.History()
    entry = history.add(net, 0)
    found = ql.search.read_bits(net)
    facts = {"bestw": found.bitw, "besta": found.bita, "figures": ql.search.figures(net), "layers": list(history.names)}
    return facts | {"certainty": entry.certainty}


def history_of(rows: Sequence[Epoch]) -> ql.search.History:
    """From the notes of each epoch, so that it is whole after a resumed run."""
    history = ql.search.History()
    for row in rows:
        history.names = tuple(row.notes["layers"])
        bits = [tuple(int(digit) for digit in row.notes[name]) for name in ("bestw", "besta")]
        prices = {name: value for name, value in row.notes["figures"].items() if name in ("mixbitops", "mixdsps")}
        history.entries.append(ql.search.history.Entry(row.number, bits[0], bits[1], row.notes["certainty"], prices, {"loss": row.loss}))
    return history


def draw_history(folder: Path, rows: Sequence[Epoch]) -> None:
    """history.json and history.png."""
    history = history_of(rows)
    history.save(folder / "history.json")
    history.plot(folder / "history.png")


def price_of(kind: Known, model: nn.Module, shape: tuple[int, ...], fixed: Sequence[str]) -> dict[str, Any]:
    """Digit strings of a fixed-bit model, its bit operations and its DSP slices in the published units (millions per image).

    bitops = sum of MAC w a, dsps = sum of MAC / products per slice, over all layers but `fixed`; for bits from 2 to 8, which the published
    packing table knows. Empty for real weights.
    """
    weights, acts = tuple(getattr(model, "weight_bits", ())), tuple(getattr(model, "act_bits", ()))
    if not weights:
        return {}
    facts: dict[str, Any] = {"bitw": _digits(weights), "bita": _digits(acts)}
    if set(weights + acts) <= set(range(2, 9)):
        width = {name: value for name, value in kind.options.items() if name == "width"}
        net = ql.search.supernet(zoo.get(kind.network, **width), input_shape=shape, fixed=fixed)
        figures = ql.search.figures(net, ql.search.make_bits(net, weights, acts))
        facts |= {name: figures[name] for name in ("bitops", "dsps")}
    return facts


def weights_file(out: Path, name: str, which: str = "best") -> Path:
    """What --weights, -w and --mixm name: a file as it is, else the checkpoint of a run of that name. SystemExit where neither exists."""
    path = Path(name)
    if path.is_file():
        return path
    path = out / name.removesuffix(".pt") / f"{which}.safetensors"
    if not path.is_file():
        raise SystemExit(f"{name}: neither a file nor a run below {out} with a {which}.safetensors")
    return path


def run_folder(config: Any) -> Path:
    """Where test, export and simulate write: the folder of the run that --weights names, else that of --name."""
    out = Path(config.out)
    named = out / config.weights.removesuffix(".pt")
    return named if config.weights and named.is_dir() else out / config.name


def stated_bits(path: Path) -> tuple[str, str]:
    """Weight and activation bits that a checkpoint states, as digit strings, ("", "") where it states none.

    Ours: the notes of the best epoch, or of the last one. Published .pt files: extra.bestw and extra.besta of a search, model_params of a
    fixed-bit training.
    """
    if path.suffix == ".safetensors":
        _, facts = load_checkpoint(path)
        notes = facts["notes"] if "notes" in facts else facts["rows"][-1]["notes"] if facts["rows"] else {}
        return notes.get("bestw", notes.get("bitw", "")), notes.get("besta", notes.get("bita", ""))
    if path.suffix == ".pt":
        content = torch_content(path)
        extra, fixed = (content.get(k) or {} for k in ("extra", "model_params")) if isinstance(content, dict) else ({}, {})
        if "bestw" in extra:
            return str(extra["bestw"]), str(extra["besta"])
        return _digits(fixed.get("bitw", ())), _digits(fixed.get("bita", ()))
    tensors = read(path)
    return tuple(_digits(tensors.get(f"model_params.{key}", ())) for key in ("bitw", "bita"))  # type: ignore[return-value]


def _digits(bits: Sequence[int] | Tensor) -> str:
    return "".join(str(int(b)) for b in bits)


RESULT = (
    "kind",
    "name",
    "epoch",
    "",
    "",
    "bitw",
    "bita",
    "train %",
    "test %",
    "",
    "bestw",
    "besta",
    "bitops",
    "mixbitops",
    "dsps",
    "mixdsps",
)


def add_result(path: Path, row: Mapping[str, Any]) -> Path:
    """Appends one row in the published order of columns (`RESULT`) to results.csv; a row that is there already is not repeated."""
    unknown = row.keys() - set(RESULT)
    if unknown:
        raise ValueError(f"results.csv has no column {', '.join(sorted(unknown))}")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(column, "") if column else "" for column in RESULT])
    old = path.read_text() if path.is_file() else ""
    if text.getvalue() not in old.splitlines(keepends=True):
        write_bytes(path, (old + text.getvalue()).encode())
    return path


def end_of_search(
    config: Any, network: str, rows: Sequence[Epoch], epochs: int, seconds: Seconds, measure: str = "accuracy"
) -> dict[str, Any]:
    """history.json and history.png, a row of results.csv, report.json and report.html. config: with `out` and `name`."""
    out = Path(config.out)
    folder, last = out / config.name, rows[-1]
    draw_history(folder, rows)
    drawn = figure_file(folder / "history.png", "Bits of each layer, and prices and loss, over the epochs.")
    figures = last.notes["figures"]
    add_result(out / "results.csv", _scores(rows) | {
        "kind": "mixed", "name": config.name, "epoch": f"{len(rows)}/{epochs}", "bestw": last.notes["bestw"], "besta": last.notes["besta"],
        **{name: f"{figures[name]:.6g}" for name in ("bitops", "mixbitops", "dsps", "mixdsps")},
    })  # fmt: skip
    header = ("epoch", "weights", "inputs", "dsps", "in expectation")
    found = [(r.number, r.notes["bestw"], r.notes["besta"], r.notes["figures"]) for r in rows]
    bits = table(header, [(n, w, a, f"{f['dsps']:.4g}", f"{f['mixdsps']:.4g}") for n, w, a, f in found])
    shown = {"bits of weights": last.notes["bestw"], "bits of inputs": last.notes["besta"]}
    shown |= {name: f"{value:.5g}" for name, value in figures.items()}
    scores = {f"supernet, {measure} of the last epoch": last.test_accuracy}
    facts = {"bestw": last.notes["bestw"], "besta": last.notes["besta"], "figures": figures, "network": network}
    return finish(
        f"{network}: search {config.name}", folder, config, scores, {"search": rows}, seconds, None, None, facts, shown, measure,
        [("Bits found", drawn + bits)],
    )  # fmt: skip


def add_training(config: Any, rows: Sequence[Epoch], epochs: int, priced: Mapping[str, Any]) -> None:
    """The row of results.csv of a training with fixed bits, or with none. priced: what `price_of` gave."""
    row: dict[str, Any] = {"kind": "fixed" if priced else "float", "name": config.name, "epoch": f"{len(rows)}/{epochs}"}
    figures = {name: f"{priced[name]:.6g}" for name in ("bitops", "dsps") if name in priced}
    add_result(Path(config.out) / "results.csv", row | _scores(rows) | {k: priced[k] for k in ("bitw", "bita") if k in priced} | figures)


def _scores(rows: Sequence[Epoch]) -> dict[str, str]:
    """Published: the test figure is the mean of the last and the best."""
    best = max(row.test_accuracy for row in rows)
    return {"train %": f"{100 * rows[-1].train_accuracy:.2f}", "test %": f"{50 * (rows[-1].test_accuracy + best):.2f}"}


def trained(config: Any, kind: Known) -> tuple[nn.Module, Path]:
    """The network that --weights (or --name) and perhaps --bitw and --bita give, with its weights, in eval mode; and the weights' file."""
    path = weights_file(Path(config.out), config.weights or config.name)
    bits = (config.bitw, config.bita) if config.bitw or config.bita else ("", "") if kind.real else stated_bits(path)
    return zoo.load(build(kind, *bits), path).eval(), path


def upstream(model: nn.Module, size: tuple[int, int], folder: Path, parallelism: str, name: str) -> list[Path]:
    """config.h, weights.hpp and model_param.npz of the published generator. SystemExit says why a network has none."""
    try:
        return write(extract(model, size), folder, parallelism or None, name=name)
    except MixqExportError as error:
        raise SystemExit(str(error)) from error


def compared(model: nn.Module, codes: Tensor) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """For a report: where codes of the published integers and of ours differ from the model on uint8 images, as facts and a section."""
    modes = ("upstream", "corrected") if getattr(model, "branch", None) else ("upstream",)
    texts = {mode: str(differences(model, codes, mode)) for mode in modes}  # type: ignore[arg-type]
    page = "".join(f"<p>mode {mode}</p>{text(content)}" for mode, content in texts.items())
    facts = {mode: content.splitlines() for mode, content in texts.items()}
    return {"differences": facts}, [("Published integers and ours against the fake-quantized model", page)]


def two_simulations(model: nn.Module, codes: Tensor, mode: str, batch: int = 16) -> tuple[Tensor, Tensor, Tensor, str]:
    """(published integers', our integers', model's output) of uint8 images, and a text: where the codes of the first batch differ."""
    network, graph = extract(model, (codes.shape[-2], codes.shape[-1])), ql.convert(model.eval(), tuple(codes.shape[1:]))
    parts = codes.split(batch)
    published = torch.cat([simulate(network, part, mode).output for part in parts])  # type: ignore[arg-type]
    ours = torch.cat([ql.run(graph, part) for part in parts])
    with torch.no_grad():
        real = torch.cat([model(part.float() / 256) for part in parts])
    return published, ours, real, str(differences(model, parts[0], mode))  # type: ignore[arg-type]


def run(commands: Mapping[str, Callable[[list[str]], Any]], argv: Sequence[str] | None, description: str) -> Any:
    """The first word is a command, the rest its flags."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in commands:
        asked = bool(words) and words[0] in ("-h", "--help")
        print(f"usage: COMMAND [flags], COMMAND --help; commands: {', '.join(commands)}\n\n{description}")
        raise SystemExit(0 if asked else f"{words[0]!r} is no command" if words else 2)
    return commands[words[0]](words[1:])
