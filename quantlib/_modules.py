"""Putting a layer into the place of another."""

from __future__ import annotations

from torch import nn


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """`new` in the place of the submodule `name`, under every name that it has: a layer used in several places stays one layer."""
    old = model.get_submodule(name)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
