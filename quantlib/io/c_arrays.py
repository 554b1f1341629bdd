"""Arrays of numbers in C source text, read without a compiler and without running anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np

from quantlib.io.checkpoints import CheckpointError

Arrays = dict[str, np.ndarray]
_BLANK = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:\\\n|[^\n])*", re.DOTALL | re.MULTILINE)
_DECLARATION = re.compile(r"\s*((?:\w+\s+)+)(\w+)\s*((?:\[\s*\w*\s*\]\s*)*)(?:=\s*([^;]*))?;", re.ASCII)  # type, name, sizes, initialiser
_NUMBER = re.compile(
    r"\s*([-+]?)(?:(0[xX][0-9a-fA-F]{1,16}|0|[1-9]\d{0,19})[uUlL]*|((?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)[fF]?)\s*\Z",
    re.ASCII,
)  # sign; hexadecimal or decimal whole number (octal is none); real number
_PIECE = re.compile(r"[{}]|[^{}]+")
_WORD_TYPES = {"uint64", "uint64_t"}


def parse(text: str, label: str) -> Arrays:
    """Arrays of a C source text: uint64 where that is the declared type, else float32. Scalars and arrays without values are left out."""
    text = _BLANK.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)  # positions and line numbers stay
    arrays: Arrays = {}
    at, end = 0, len(text.rstrip())
    while at < end:
        found = _DECLARATION.match(text, at)
        if not found:
            shown = " ".join(text[at : at + 200].split())[:40]
            raise CheckpointError(
                f"{label}, line {_line(text, at)}: expected an array such as `float name[2] = {{1, 2}};`, found `{shown}`"
            )
        kind, name, sizes, body = found.groups()
        if sizes and body is not None:
            place = f"{label}, line {_line(text, found.start(2))}: {name}{''.join(sizes.split())}"
            shape = _shape(sizes, place)
            numbers = _numbers(text, found.start(4), found.end(4), shape, place)
            if numbers:
                if name in arrays:
                    raise CheckpointError(f"{place} is declared a second time")
                arrays[name] = _typed(numbers, bool(_WORD_TYPES & set(kind.split())), place).reshape(shape)
        at = found.end()
    return arrays


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at + len(text[at:]) - len(text[at:].lstrip())) + 1


def _shape(sizes: str, place: str) -> tuple[int, ...]:
    parts = [part.strip() for part in re.findall(r"\[([^\]]*)\]", sizes)]
    if not all(part.isdigit() and int(part) > 0 for part in parts) or prod(map(int, parts)) > 1 << 28:
        raise CheckpointError(f"{place}: sizes are plain numbers from 1 on")
    return tuple(map(int, parts))


def _numbers(text: str, start: int, end: int, shape: tuple[int, ...], place: str) -> list[int | float]:
    """The numbers between the braces, in order; nested braces must follow the shape, one flat list may hold them all."""
    numbers: list[int | float] = []
    open_: list[list[int]] = []  # of each open brace: how many lists are in it, how many numbers came before it
    done, comma = False, False  # the outermost brace is closed; a comma must come before the next value
    for found in _PIECE.finditer(text, start, end):
        piece = found.group().strip()
        if not piece:
            continue
        where = partial(_line, text, found.start())
        if done or (not open_ and piece != "{"):
            raise CheckpointError(f"{place}: expected one list in braces, found `{piece[:20]}` on line {where()}")
        if piece == "{":
            if comma or len(open_) == len(shape) or (open_ and not open_[-1][0] and len(numbers) > open_[-1][1]):
                raise CheckpointError(f"{place}: the brace on line {where()} is out of place")
            if open_:
                open_[-1][0] += 1
            open_.append([0, len(numbers)])
        elif piece == "}":
            _, before = open_.pop()
            size, needed = len(numbers) - before, prod(shape[len(open_) :])
            if size != needed and (open_ or numbers):
                inside = f" in the list that ends on line {where()}" if open_ else ""
                raise CheckpointError(f"{place} lists {size} values{inside}, its shape needs {needed}")
            done, comma = not open_, True
        elif piece == "," and comma:
            comma = False
        else:
            if open_[-1][0]:
                raise CheckpointError(f"{place}: `{piece[:20]}` on line {where()} stands between lists")
            parts = piece.split(",")
            for part in parts[:-1] if parts[-1].strip() == "" else parts:
                numbers.append(_number(part, place, where))
            comma = True
    if not done:
        raise CheckpointError(f"{place}: its list is not closed")
    return numbers


def _number(text: str, place: str, where: Callable[[], int]) -> int | float:
    found = _NUMBER.match(text)
    if not found:
        raise CheckpointError(f"{place}: `{text.strip()[:20]}` on line {where()} is no number")
    sign, whole, real = found.groups()
    value = float(real) if real else int(whole, 16) if whole[:2] in ("0x", "0X") else int(whole)
    return -value if sign == "-" else value


def _typed(numbers: list[int | float], words: bool, place: str) -> np.ndarray:
    if words:
        if not all(isinstance(n, int) and 0 <= n < 1 << 64 for n in numbers):
            raise CheckpointError(f"{place}: words are integers from 0 to 2^64 - 1")
        return np.array(numbers, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return np.array([float(n) for n in numbers]).astype(np.float32)
