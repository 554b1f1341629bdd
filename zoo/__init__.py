"""Published quantized networks, by name: `zoo.names()`, `zoo.card(name)`, `zoo.get(name, **options)`, `zoo.load(model, source)`.

Every file beside this one without a leading underscore is one paper and registers its networks when imported.
"""

from importlib import import_module
from pkgutil import iter_modules

from quantlib.io.checkpoints import CheckpointError, load
from zoo._registry import Card, Claim, ZooError, card, get, names

__all__ = ["Card", "CheckpointError", "Claim", "ZooError", "card", "get", "load", "names"]

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")
