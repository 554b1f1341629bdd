"""Which networks there are, what is known about each, and how one is built. A network registers itself; nothing here names one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


class ZooError(ValueError):
    """An unknown network or option; the message offers the nearest names."""


@dataclass(frozen=True)
class Claim:
    """One number somebody stands for: what it is, the value in its unit, and where it is written or how it was measured."""

    what: str
    value: float
    unit: str
    source: str

    def __str__(self) -> str:
        return f"{self.what}: {self.value:g} {self.unit} ({self.source})"


@dataclass(frozen=True)
class Card:
    """What is known about one registered network, with its options at their defaults.

    input_shape has no batch axis. Images are pixel / 255, normalised with normalisation = (mean, std) per channel where that is given.
    parameters and macs are counted for one image and compared with the built network by the tests. claims are the paper's numbers, measured
    are ours. options maps every keyword of the builder to one sentence. converts lists option sets whose models convert to integers; the
    tests run each of them, on images of convert_shape where input_shape would take minutes. output_shape is that of one image's output
    where it is not (classes,).
    """

    title: str
    paper: str
    arxiv: str
    code: str
    licence: str
    input_shape: tuple[int, ...]
    classes: int
    parameters: int
    macs: int
    options: Mapping[str, str]
    claims: tuple[Claim, ...] = ()
    measured: tuple[Claim, ...] = ()
    notes: str = ""
    converts: tuple[Mapping[str, Any], ...] = ({},)
    convert_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __str__(self) -> str:
        lines = [
            self.title,
            f"  {self.paper}" + (f", arXiv {self.arxiv}" if self.arxiv else ""),
            f"  code {self.code}, licence {self.licence}",
        ]
        output = f"{self.classes} classes" if self.output_shape is None else f"output {'x'.join(map(str, self.output_shape))}"
        lines.append(f"  input {'x'.join(map(str, self.input_shape))}, {output}, {self.parameters:,} parameters, {self.macs:,} MAC")
        lines += [f"  option {name}: {text}" for name, text in self.options.items()]
        lines += [f"  published {claim}" for claim in self.claims] + [f"  measured {claim}" for claim in self.measured]
        return "\n".join(lines + ([f"  {self.notes}"] if self.notes else []))


Builder = Callable[..., nn.Module]
_NETWORKS: dict[str, tuple[Builder, Card]] = {}


def register(card: Card) -> Callable[[Builder], Builder]:
    """Decorator of a function with keyword-only options that builds one network; its name is the network's name.

    TypeError when the name is taken, an option is positional, or the card's options are not exactly the function's.
    """

    def add(build: Builder) -> Builder:
        name = build.__name__
        parameters = inspect.signature(build).parameters
        if name in _NETWORKS:
            raise TypeError(f"two networks are called {name}")
        loose = [p.name for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        if loose:
            raise TypeError(f"{name}: the options {', '.join(loose)} must be keyword-only")
        if set(parameters) != set(card.options):
            raise TypeError(f"{name}: the card describes the options {sorted(card.options)}, the function takes {sorted(parameters)}")
        _NETWORKS[name] = (build, card)
        return build

    return add


def names(pattern: str = "*") -> list[str]:
    """Registered networks, sorted, that match a shell pattern: names("fracbnn*")."""
    return sorted(name for name in _NETWORKS if fnmatchcase(name, pattern))


def _find(name: str) -> tuple[Builder, Card]:
    if name not in _NETWORKS:
        near = get_close_matches(name, _NETWORKS, n=3, cutoff=0.4)
        raise ZooError(
            f"no network is called {name!r}" + (f"; near it: {', '.join(near)}" if near else f"; there are {', '.join(names())}")
        )
    return _NETWORKS[name]


def card(name: str) -> Card:
    """What is known about a network. ZooError, with the nearest names, when there is none of that name."""
    return _find(name)[1]


def get(name: str, **options: Any) -> nn.Module:
    """Builds a network, untrained and in training mode. ZooError names the nearest networks or options on an unknown one."""
    build, about = _find(name)
    for option in options:
        if option not in about.options:
            near = get_close_matches(option, about.options, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ZooError(f"{name} has no option {option!r}{hint} It takes {', '.join(about.options) or 'none'}.")
    return build(**options)
