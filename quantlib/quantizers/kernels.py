"""The compiled kernels of the quantizers (kernels.cpp): one pass over memory each way, on the CPU, for float32 and float64.

They are compiled once per machine, as the packed engine is (quantlib/engine/build.py), and give the same values as the tensor operations
beside them, which do the work where there is no compiler, on other devices, in other dtypes, and while a model is traced or compiled.
QUANTLIB_ENGINE=torch turns them off.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Places = tuple[int, int, int]  # outer, channels, inner: how a map lies in memory

SOURCE = Path(__file__).with_name("kernels.cpp")
EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")  # every operation rounds by itself
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES: dict[str, tuple[Any, ...]] = {  # without the leading (wide) and the closing (threads) number
    "learned_scale": (_P, _P, _P, _I, _I, _I, _D, _D),
    "learned_scale_back": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _D, _D, _D, _D, _D, _D),
    "max_abs": (_P, _P, _P, _P, _I, _I, _I, _D, _D),
    "max_abs_back": (_P, _P, _P, _P, _P, _P, _P, _I, _I, _D),
    "rprelu": (_P, _P, _P, _P, _P, _I, _I, _I),
    "rprelu_back": (_P, _P, _P, _P, _P, _P, _I, _I, _I),
    "thirds": (_P, _P, _P, _I),
    "before_gate": (_P, _P, _P, _I, _I, _I),
    "merged": (_P, _P, _P, _I),
    "gated_back": (_P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I),
    "divided_clip": (_P, _P, _I, _P, _D, _D),
    "divided_clip_back": (_P, _P, _P, _P, _I, _P, _P, _P),
}


@cache
def _library() -> ctypes.CDLL | None:
    """None where there are no kernels. One look at the environment: this is asked several times in every layer."""
    from quantlib.engine.build import Unavailable, compiled, flags

    body = os.environ.get("QUANTLIB_ENGINE") or "native"
    if body not in ("native", "portable"):
        return None
    try:
        handle = ctypes.CDLL(str(compiled(f"quantizers-{body}", SOURCE, (*flags(body), *EXACT), [SOURCE])))
    except (Unavailable, OSError, RuntimeError):
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(handle, f"ql_{name}")
        function.argtypes = [_I, *arguments, _I]
        function.restype = _I if name in ("thirds", "merged") else None
    return handle


def fit(*tensors: Tensor) -> bool:
    """Whether the kernels take these: plain tensors of one dtype, float32 or float64, on the CPU; where nobody records what is called
    (conversion, tracing, compilation, torch's modes), for kernels are called behind torch's back; and whether there are kernels."""
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64) or not tensors[0].numel():
        return False
    for t in tensors:
        if t.dtype is not dtype or t.device.type != "cpu" or type(t) not in (Tensor, nn.Parameter):
            return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()) and _library() is not None


def places(x: Tensor, channels: int) -> Places | None:
    """How x lies in memory, for constants of one element or of one per channel (axis 1); None where it has gaps or another order."""
    last = False
    if not x.is_contiguous():
        if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        last = True
    size = x.numel()
    if channels == 1:
        return 1, 1, size
    if x.dim() < 2 or x.shape[1] != channels:
        return None
    return (size // channels, channels, 1) if last else (x.shape[0], channels, size // (x.shape[0] * channels))


def alike(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of `like`: itself, or a copy where a gradient comes in another layout."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def call(name: str, *arguments: Any, dtype: torch.dtype) -> Any:
    """Runs a kernel on tensors (by address; None is a null pointer) and numbers. The caller has asked `fit` and keeps to SIGNATURES."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    handle = _library()
    assert handle is not None, "fit() was asked before"
    return getattr(handle, f"ql_{name}")(dtype is torch.float64, *values, torch.get_num_threads())
