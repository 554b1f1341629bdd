"""The second architecture: one engine that runs a network layer by layer, with weights and feature maps in external memory.

`estimate` sizes the engine for a part, `export` writes its project; docs/layerwise.md describes both. Names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlib.layerwise.planning import LayerwiseError as LayerwiseError
    from quantlib.layerwise.planning import Plan as Plan
    from quantlib.layerwise.planning import estimate as estimate
    from quantlib.layerwise.project import Project as Project
    from quantlib.layerwise.project import export as export

_WHERE = {"LayerwiseError": "planning", "Plan": "planning", "estimate": "planning", "Project": "project", "export": "project"}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quantlib.layerwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quantlib.layerwise.{_WHERE[name]}"), name)
