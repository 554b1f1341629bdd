"""Two processes started by accelerate on the CPU (gloo) against one.

On a machine without MPI the launcher's option for several GPUs is the one that starts several processes; without GPUs they run on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("_two_processes.py")


def run(out: Path, *launch: str) -> dict[str, torch.Tensor]:
    root = SCRIPT.parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launch, str(SCRIPT), str(out)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "found.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0")  # fmt: skip
    return (one, run(one)), (two, run(two, *launch))


def test_gradients_and_metrics_agree(results):
    """Six steps of gradient descent on integers over a power of two: weights, losses and accuracies are equal, not close."""
    (one, alone), (two, together) = results
    assert torch.equal(alone["exact"], together["exact"])
    assert (one / "exact/log.csv").read_bytes() == (two / "exact/log.csv").read_bytes()
    for key in alone:
        if key.startswith("real/"):
            # the two halves of a batch are summed in another order: a few units in the last place of float64, through nine steps of Adam
            torch.testing.assert_close(together[key], alone[key], rtol=0, atol=1e-12)
    tables = [[[float(v) for v in line.split(",")] for line in (f / "real/log.csv").read_text().splitlines()[1:]] for f in (one, two)]
    for a, b in zip(*tables, strict=True):
        assert abs(a[1] - b[1]) < 1e-12 and a[2:] == b[2:]  # the loss is a sum; accuracies, rate and images are exact


def test_processes_hold_one_model(results):
    (_, alone), (_, together) = results
    assert alone["net"].shape[0] == 1 and together["net"].shape[0] == 2
    assert torch.equal(together["net"][0], together["net"][1]) and bool(together["net"].isfinite().all())
