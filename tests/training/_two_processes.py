"""Run by test_processes.py, alone or under `accelerate launch`: trains on integers, real numbers and FracBNN; writes what came out."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

import zoo
from quantlib.training import SGD, Constant, Fit, digits, fit, is_main_process


@dataclass
class Rows:
    """Real rows as they are."""

    x: torch.Tensor
    y: torch.Tensor
    name: str = "rows"
    unreadable: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.x)

    def read(self, batches, augment, key, workers):
        return ((self.x[b], self.y[b]) for b in batches)


class Squares(nn.Module):
    def forward(self, outputs, labels, images):
        return (outputs - nn.functional.one_hot(labels, 2)).square().sum(1).mean()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    y = torch.from_numpy(draw.integers(0, 2, 24))
    found = {}

    # Multiples of 1/4 and powers of two: every sum is exact in float64, in whatever order it is taken.
    exact = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        exact.weight.copy_(torch.from_numpy(draw.integers(-4, 5, (2, 4)) / 4))
    data = Rows(torch.from_numpy(draw.integers(-4, 5, (24, 4)) / 4), y)
    sgd = {"optimizer": SGD(0.0), "schedule": Constant()}
    fit(exact, data, data, Fit(2, 8, 2.0**-6, **sgd), Squares(), out=out / "exact")
    found["exact"] = exact.weight

    # Cross entropy, Adam, a last batch of 6 and uneven shares of it: 22 = 8 + 8 + 6 rows.
    torch.manual_seed(1)
    real = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    few = Rows(data.x[:21], y[:21])
    fit(real, few, few, Fit(3, 8, 0.05), out=out / "real")
    found |= {f"real/{k}": v for k, v in real.state_dict().items()}

    # Batch normalisation sees half a batch each, so this one differs from one process; its processes must not differ from each other.
    torch.manual_seed(2)
    net = zoo.get("fracbnn_digits")
    fit(net, digits("train")[:64], digits("test")[:21], Fit(1, 16, shift=1, gate_target=1.0, average=0.5), out=out / "net")
    flat = torch.cat([v.double().flatten() for v in net.state_dict().values()])
    found["net"] = Accelerator().gather(flat[None])
    if is_main_process():
        save_file({k: v.detach().contiguous() for k, v in found.items()}, out / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
