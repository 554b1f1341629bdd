"""Command-line flags of a recipe, read off its frozen configuration."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


def parse(defaults: C, description: str, help: Mapping[str, str], argv: Sequence[str] | None, short: Mapping[str, str] | None = None) -> C:
    """defaults: a frozen dataclass of bool, int, float, str and tuple[int or str, ...] fields; each becomes --its-name.

    A bool is a switch, a tuple is written with commas. Published scripts' --its_name is understood too. help: field -> sentence; short:
    field -> a second flag such as -g.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(type(defaults))
    for name, default in ((f.name, getattr(defaults, f.name)) for f in dataclasses.fields(defaults)):  # type: ignore[arg-type]
        flags = [*([short[name]] if short and name in short else []), f"--{name.replace('_', '-')}"]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        sentence = f"{help.get(name, '')} (default: {shown if shown != '' else 'none'})".strip().replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(*flags, dest=name, action="store_true", help=help.get(name))
        elif get_origin(hints[name]) is tuple:
            several = _Several(get_args(hints[name])[0])
            parser.add_argument(*flags, dest=name, type=several, default=default, help=sentence, metavar="A,B,...")
        else:
            parser.add_argument(*flags, dest=name, type=type(default), default=default, help=sentence)
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    return type(defaults)(**vars(parser.parse_args(words)))


def _dashed(word: str) -> str:
    """--its_name=some_value -> --its-name=some_value"""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


class _Several:
    """1,2 -> (1, 2)"""

    def __init__(self, kind: type) -> None:
        self.kind, self.__name__ = kind, f"list of {kind.__name__}"

    def __call__(self, text: str) -> tuple[Any, ...]:
        return tuple(self.kind(word) for word in text.split(",") if word)


def network_options(texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE texts as keyword arguments: Python literals, plain words as strings, and BITS,FRACTION as a FixedPoint."""
    result: dict[str, Any] = {}
    for item in texts:
        name, equals, value = item.partition("=")
        if not equals:
            raise SystemExit(f"--option {item}: write NAME=VALUE")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[name] = value
        if name == "fixed_point" and isinstance(result[name], tuple):
            from quantlib.layers import FixedPoint

            result[name] = FixedPoint(*result[name])
    return result
