"""HLS projects: export writes one, Project.csim compiles and runs it.

Names are loaded on first use, because the ops describe their kernels with `quantlib.hls.call`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlib.hls.project import Deadlock as Deadlock
    from quantlib.hls.project import ExportError as ExportError
    from quantlib.hls.project import Project as Project
    from quantlib.hls.project import export as export

__all__ = ["Deadlock", "ExportError", "Project", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quantlib.hls' has no attribute {name!r}")
    from quantlib.hls import project

    return getattr(project, name)
