"""The register of layers: what lets one generic test reach all of them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

Example = tuple[nn.Module, Tensor]


def brevitas_options(layer: str, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword options that a layer hands on to Brevitas, which ignores unknown ones; TypeError for those."""
    known = ("device", "dtype", "padding_mode", "return_quant_tensor")
    for name in options:
        if name not in known and not name.startswith(("input_", "output_", "bias_")):
            raise TypeError(
                f"{layer} has no option {name!r}; Brevitas takes {', '.join(known)} and those that begin with input_, output_, bias_"
            )
    return options


class Layer:
    """Mixin of every layer class of this library. A subclass has a docstring and `examples()`; a class without either cannot be imported.

    examples() -> [(module, input)]: small networks of odd shapes around the layer that convert as they stand (a quantizer in front of what
    needs integers, one behind what is no quantizer), with float32 images (N, C, H, W) or (N, C), on the layer's `input_grid()` where it has
    one. A layer that is no plain Brevitas layer has `lower(g, x)` right under `forward`. Without a Brevitas quantizer it says the bits of
    its codes as `out_bits` and those of its weights as `weight_bits`; one that only moves elements says `moves = True` (docs/analysis.md).
    """

    registry: ClassVar[dict[str, type[Layer]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        missing = [] if (cls.__doc__ or "").strip() and "__doc__" in vars(cls) else ["a docstring"]
        if "examples" not in vars(cls):
            missing.append("examples()")
        if missing:
            raise TypeError(f"layer {cls.__name__} lacks {', '.join(missing)}")
        if cls.__name__ in Layer.registry:
            raise TypeError(f"two layers are called {cls.__name__}")
        Layer.registry[cls.__name__] = cls

    @staticmethod
    def examples() -> list[Example]:
        """Small modules with inputs for the generic tests."""
        raise NotImplementedError


def _quantizes_alone(proxy: Any) -> bool:
    """A Brevitas proxy that quantizes, and whose calls nobody watches."""
    return proxy.is_quant_enabled and not (proxy._forward_hooks or proxy._forward_pre_hooks or proxy._backward_hooks)  # type: ignore[no-any-return]


class DirectWeights:
    """A Brevitas convolution or matrix product that asks its weight quantizer directly while training on plain tensors.

    The same values and gradients without the steps in between (quantized tensors, caches, exporters), which take longer than the quantizer
    on small maps.
    """

    def forward_impl(self: Any, x: Any) -> Any:
        if self.training and type(x) is Tensor and not self.return_quant_tensor and _quantizes_alone(self.weight_quant):
            if not (self.input_quant.is_quant_enabled or self.output_quant.is_quant_enabled or self.bias_quant.is_quant_enabled):
                return self.inner_forward_impl(x, self.weight_quant.tensor_quant(self.weight)[0], self.bias)
        return super().forward_impl(x)  # type: ignore[misc]
