"""Helpers for tests of conversion: settle a small network's quantizers and statistics, and demand that its integer network is exact."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantlib as ql
from quantlib.evaluator import encode
from quantlib.verification import Check


def settle(model: nn.Module, sample: Any, steps: int = 3, seed: int = 0) -> nn.Module:
    """Run a few training batches (activation scales take their statistics), then give every batch norm odd statistics: a third of the gammas negative, one zero."""
    random = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(sample(random))
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                c = m.num_features
                m.running_mean.copy_(m.running_mean + 0.3 * torch.randn(c, generator=random))
                m.running_var.copy_(m.running_var * (0.5 + torch.rand(c, generator=random)))
                if m.affine:
                    sign = torch.where(torch.rand(c, generator=random) < 0.3, -1.0, 1.0)
                    m.weight.copy_(sign * (0.3 + torch.rand(c, generator=random)))
                    m.bias.copy_(0.5 * torch.randn(c, generator=random))
                    if c > 3:
                        m.weight[c // 2] = 0.0
    return model.eval()


def flat(tree: Any) -> list[Tensor]:
    """The tensors of a model's output in order; quant tensors by value."""
    if isinstance(tree, Tensor):
        return [tree]
    if hasattr(tree, "value") and hasattr(tree, "scale"):
        return [tree.value]
    if isinstance(tree, dict):
        tree = tree.values()
    return [t for item in tree for t in flat(item)]


def float64_output(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flat(copy.deepcopy(model).double().eval()(x.double()))


def assert_exact(model: nn.Module, graph: ql.Graph, x: Tensor, ties: bool = False) -> Check:
    """The integer network equals the model on real images x: every code, the output, at several batch sizes.

    Unless the network has structural ties (`ties`), the plain float64 model must agree in every code as well: it shares nothing with our capture.
    """
    check = ql.verify(model, graph, x)
    assert check.ok, str(check)
    assert check.codes > 0
    y = ql.run(graph, x)
    whole = flat(y)
    if not ties:
        assert all(r.float64 == 0 for r in check.rows), str(check)
        for got, want in zip(whole, float64_output(model, x), strict=True):
            assert got.shape == want.shape
            # the decode is float64 rounded once to float32 (2^-24), the model a float64 sum in another order
            np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-6, atol=1e-6 * float(want.abs().max() + 1))
    codes = encode(graph, x)
    integers = ql.run(graph, x, integers=True)
    assert list(integers) == list(graph.outputs)
    for n in (1, 3):
        part = ql.run(graph, x[:n], integers=True)
        assert all(torch.equal(part[k], integers[k][:n]) for k in integers), f"batch {n} differs"
    again = ql.run(graph, codes, integers=True)
    assert all(torch.equal(again[k], integers[k]) for k in integers), "codes and real images differ"
    if graph.input.type.lo >= 0 and graph.input.type.hi <= 255:
        bytes_ = ql.run(graph, codes.to(torch.uint8), integers=True)
        assert all(torch.equal(bytes_[k], integers[k]) for k in integers), "uint8 images differ"
    return check


def graph_fields_hold(graph: ql.Graph, x: Tensor) -> None:
    """Every edge stays in its declared interval and on its lattice on these images."""
    from quantlib.evaluator import execute

    names = [n.name for n in graph.nodes]
    for name, values in execute(graph, encode(graph, x), names).items():
        t = graph.by_name[name].type
        assert tuple(values.shape[1:]) == t.shape, name
        assert int(values.min()) >= t.lo and int(values.max()) <= t.hi, f"{name} leaves {t}"
        assert not bool(((values - t.lo) % t.step).any()), f"{name} leaves the lattice of {t}"
