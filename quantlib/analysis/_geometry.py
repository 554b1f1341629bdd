"""Sizes of convolution windows and pools, read off modules and function arguments."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

from torch import Tensor, nn

from quantlib.analysis._steps import Window


def is_convolution(m: Any) -> bool:
    weight = getattr(m, "weight", None)
    attributes = ("kernel_size", "stride", "padding", "dilation", "groups")
    return isinstance(weight, Tensor) and 3 <= weight.dim() <= 5 and all(hasattr(m, name) for name in attributes)


def brevitas_name(m: nn.Module) -> str:
    """The class of brevitas.nn that a layer is or derives from."""
    return next((c.__name__ for c in type(m).__mro__ if c.__module__.startswith("brevitas.nn")), "")


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return (int(value),) * axes if isinstance(value, int) else tuple(int(v) for v in (tuple(value) * axes if len(value) == 1 else value))


def window_of(size: Any, stride: Any, padding: Any, dilation: Any, groups: int, transposed: bool = False) -> Window:
    kernel = tuple(int(k) for k in size[2:])
    axes = len(kernel)
    dilations = per_axis(dilation, axes)
    if padding == "same":
        sides = tuple(d * (k - 1) for d, k in zip(dilations, kernel, strict=True))
    else:
        sides = (0,) * axes if padding == "valid" else tuple(2 * p for p in per_axis(padding, axes))
    c_in, c_out = (size[0], size[1] * groups) if transposed else (size[1] * groups, size[0])
    return Window(kernel, per_axis(stride, axes), sides, dilations, int(groups), int(c_in), int(c_out), transposed)


def adaptive_terms(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Elements of all windows of an adaptive pool: output i reads floor(i n / m) .. ceil((i + 1) n / m) of each axis."""
    return prod(sum(ceil((i + 1) * n / m) - i * n // m for i in range(m)) for n, m in zip(before, after, strict=True))


def pool_terms(m: Any, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    kernel = getattr(m, "kernel_size", None)
    if kernel is None:
        axes = len(after) - 2
        return prod(after[:2]) * adaptive_terms(before[2:], after[2 : 2 + axes])
    return prod(after) * prod(per_axis(kernel, len(after) - 2))


def function_terms(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Elements that a pooling function reads, window by window."""
    if name in ("mean", "sum", "amax"):
        return prod(before)
    axes = len(after) - 2
    kernel = kwargs.get("kernel_size", args[1] if len(args) > 1 else None)
    adaptive = name.startswith("adaptive") or kernel is None
    if not adaptive and name == "boolean_dispatch" and len(args) == 2 and not kwargs:  # F.max_pool2d and F.adaptive_max_pool2d alike
        adaptive = per_axis(kernel, axes) == after[2:]
    if adaptive:
        return prod(after[:2]) * adaptive_terms(before[2:], after[2:])
    return prod(after) * prod(per_axis(kernel, axes))


def mode_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return str(kwargs.get("mode", args[3] if len(args) > 3 else "nearest"))


def tracked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    from quantlib.capture import refs

    return refs((args, kwargs))


def constant_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Constant tensors among the arguments."""
    from quantlib.capture import walk as each

    found: list[Tensor] = []
    each((args, kwargs), lambda t: found.append(t) if isinstance(t, Tensor) else None)
    return found
