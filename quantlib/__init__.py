"""quantlib: low-bit networks from published FPGA papers, from training on Brevitas to bit-exact hardware source.

zoo.get -> (train) -> convert -> run / verify -> estimate -> export -> csim. Names are loaded on first use, so that running, estimating
and simulating a saved graph never import Brevitas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import quantlib.analysis as analysis
    import quantlib.layerwise as layerwise
    import quantlib.search as search
    from quantlib import layers as layers
    from quantlib import quantizers as quantizers
    from quantlib.evaluator import run as run
    from quantlib.hls import export as export
    from quantlib.io.graph import load as load
    from quantlib.io.graph import save as save
    from quantlib.ir import Graph as Graph
    from quantlib.ir import Grid as Grid
    from quantlib.layers import FixedPoint as FixedPoint
    from quantlib.lowering import ConversionError as ConversionError
    from quantlib.lowering import convert as convert
    from quantlib.schedule import estimate as estimate
    from quantlib.verification import verify as verify

__version__ = "0.1.0"

# public name -> module that defines it; a module of the same name needs no attribute
_WHERE = {
    "convert": "quantlib.lowering",
    "ConversionError": "quantlib.tails",
    "run": "quantlib.evaluator",
    "verify": "quantlib.verification",
    "estimate": "quantlib.schedule",
    "export": "quantlib.hls",
    "save": "quantlib.io.graph",
    "load": "quantlib.io.graph",
    "Graph": "quantlib.ir",
    "Grid": "quantlib.ir",
    "FixedPoint": "quantlib.layers",
    "analysis": "quantlib.analysis",
    "layers": "quantlib.layers",
    "quantizers": "quantlib.quantizers",
    "search": "quantlib.search",
    "layerwise": "quantlib.layerwise",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quantlib' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = import_module(_WHERE[name])
    value = module if module.__name__ == f"quantlib.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
