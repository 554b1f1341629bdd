"""The history of a search: what it keeps, on disk and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from search import nets

from quantlib.search import History, layers, supernet


def test_it_is_kept_as_json_and_drawn(tmp_path: Path) -> None:
    net = supernet(nets.scaled(), input_shape=nets.SHAPE)
    history = History()
    for epoch in range(3):
        layers(net)[1].alpha_weight.data[epoch] += 5
        history.add(net, epoch, costs={"complexity": torch.tensor(3.0 - epoch)}, losses={"train": 1.0 / (epoch + 1)})
    assert [e.weight_bits for e in history.entries] == [(2, 2, 2), (2, 2, 2), (2, 2, 2)]
    layers(net)[1].alpha_weight.data[5] += 50
    last = history.add(net, 3)
    assert last.weight_bits == (2, 7, 2) and last.act_bits == (2, 2, 2) and 1 / 7 < last.certainty < 1
    path = history.save(tmp_path / "history.json")
    again = History.load(path)
    assert again.entries == history.entries and again.names == history.names == ("1", "4", "9")
    assert json.loads(path.read_text())["epochs"][1]["costs"] == {"complexity": 2.0}
    pytest.importorskip("matplotlib")
    picture = again.plot(tmp_path / "history.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.json", "history.png"]


def test_another_supernet_and_an_empty_history_are_refused(tmp_path: Path) -> None:
    history = History()
    with pytest.raises(ValueError, match="nothing to draw"):
        history.plot(tmp_path / "x.png")
    history.add(supernet(nets.scaled(), input_shape=nets.SHAPE), 0)
    with pytest.raises(ValueError, match="this history is of a supernet with the layers 1, 4, 9"):
        history.add(supernet(nets.Branches(), input_shape=nets.SHAPE), 1)
