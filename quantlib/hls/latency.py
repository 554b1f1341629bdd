"""When the first image leaves: the time of every word on every wire of an empty network, without running it."""

from __future__ import annotations

import numpy as np

from quantlib.hls.netlist import Netlist


def first_image(net: Netlist) -> int:
    """Cycles from the first word into the network to the last word out of it, of one image in an empty network.

    A stage of I iterations whose first of W output words needs d input words writes word k, counted from 1, in iteration
    d - 1 + k (I - d + 1) / W, rounded down, at the earliest, and a cycle after the last word it needs has come; what holds up one word
    holds up all behind it as long. FIFOs are taken to have room, which those of a plan have.
    """
    source = net.input
    times = {source.wire.name: np.arange(1, source.wire.port.words + 1, dtype=np.int64) * source.iterations // source.wire.port.words}
    for stage in net.stages:
        demand = stage.demand()
        words, needed = len(demand[0]), max(int(need[0]) for need in demand)
        alone = needed - 1 + np.arange(1, words + 1, dtype=np.int64) * (stage.iterations - needed + 1) // words
        ready = np.zeros(words, dtype=np.int64)
        for wire, need in zip(stage.inputs, demand, strict=True):
            ready = np.maximum(ready, np.where(need > 0, times[wire.name][np.maximum(need, 1) - 1] + 1, 0))
        written = alone + np.maximum(np.maximum.accumulate(ready - alone), 0)
        times.update((wire.name, written) for wire in stage.outputs)
    return max(int(times[pin.wire.name][-1]) + 1 for pin in net.outputs)
