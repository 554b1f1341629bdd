"""Arrays of numbers in C source text, read without a compiler and without running anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod

import numpy as np

from quantlib.io.checkpoints import CheckpointError

Arrays = dict[str, np.ndarray]
_BLANK = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:\\\n|[^\n])*", re.DOTALL | re.MULTILINE)
_DECLARATION = re.compile(r"\s*((?:\w+\s+)+)(\w+)\s*((?:\[\s*\w*\s*\]\s*)*)(?:=\s*([^;]*))?;", re.ASCII)  # type, name, sizes, initialiser
_TOKEN = re.compile(r"\s*(?:([{},])|([-+]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))([fFuUlL]*)(?![\w.])|(\S+))")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)\Z")
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


def _numbers(text: str, start: int, end: int, shape: tuple[int, ...], place: str) -> list[str]:
    """The numbers between the braces, in order; nested braces must follow the shape, one flat list may hold them all."""
    numbers: list[str] = []
    open_: list[list[int]] = []  # of each open brace: lists in it, numbers in it, numbers before it
    closed, wanted = False, True  # a value or brace may come; false right after one
    for number, punctuation, at in _tokens(text, start, end):
        if closed or (not open_ and punctuation != "{"):
            raise CheckpointError(f"{place}: expected one list in braces")
        if punctuation == "{" and wanted and len(open_) < len(shape):
            if open_:
                open_[-1][0] += 1
            open_.append([0, 0, len(numbers)])
        elif punctuation == "}" and open_:
            lists, own, before = open_.pop()
            size, needed = len(numbers) - before, prod(shape[len(open_) :])
            empty = not open_ and not numbers
            if not empty and (size != needed or (lists and own)):
                inside = f"in the list that ends on line {_line(text, at)}" if open_ else "in all"
                raise CheckpointError(f"{place} lists {size} values {inside}, its shape needs {needed}")
            closed, wanted = not open_, False
        elif punctuation == "," and not wanted:
            wanted = True
        elif number and wanted:
            numbers.append(number)
            open_[-1][1] += 1
            wanted = False
        else:
            raise CheckpointError(f"{place}: `{punctuation or number}` on line {_line(text, at)} is out of place")
    if not closed:
        raise CheckpointError(f"{place}: its list is not closed")
    return numbers


def _tokens(text: str, start: int, end: int) -> Iterator[tuple[str, str, int]]:
    """(number, punctuation, position) of each token; what is neither comes as punctuation."""
    end -= len(text[start:end]) - len(text[start:end].rstrip())
    while start < end:
        found = _TOKEN.match(text, start, end)
        assert found
        punctuation, number, suffix, other = found.groups()
        bad = number and suffix and (set(suffix) & set("fF") and ("x" in number.lower() or len(suffix) > 1))
        yield ("" if bad else number or ""), (punctuation or other or (number + suffix if bad else "")), found.start(found.lastindex or 0)
        start = found.end()


def _typed(numbers: list[str], words: bool, place: str) -> np.ndarray:
    if words:
        values = [int(n, 0) if _INTEGER.match(n) else -1 for n in numbers]
        if min(values) < 0 or max(values) >= 1 << 64:
            raise CheckpointError(f"{place}: words are integers from 0 to 2^64 - 1")
        return np.array(values, dtype=np.uint64)
    array = np.array([int(n, 16) if "x" in n.lower() else float(n) for n in numbers], dtype=np.float64)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
