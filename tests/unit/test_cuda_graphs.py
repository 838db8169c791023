"""CUDA graphs: which shapes have one, and, where there is a GPU, that a replay answers as the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sceneray import bundle, runtimes
from sceneray.cuda_graphs import GraphedScores, Slots
from sceneray.data import town
from tests.bundles import write_lively_bundle


def put(slots: Slots[str, int], *keys: str) -> None:
    """Put keys in as a caller does: looked up first, and only where there is room."""
    for key in keys:
        if slots.get(key) is None and slots.make_room():
            slots.put(key, ord(key))


def held(slots: Slots[str, int], keys: str) -> str:
    """Those of `keys` that have a value. Looks every one up."""
    return "".join(key for key in keys if slots.get(key) == ord(key))


def test_what_fits_is_kept() -> None:
    """Up to `most` keys have their values, and a key that never came has none."""
    slots: Slots[str, int] = Slots(most=3, patience=0)
    put(slots, "a", "b", "c", "a")
    assert len(slots) == 3
    assert held(slots, "abcd") == "abc"


def test_the_least_recently_used_makes_room() -> None:
    """With no patience a fourth key takes the place of the one wanted longest ago, not of the first to come."""
    slots: Slots[str, int] = Slots(most=3, patience=0)
    put(slots, "a", "b", "c", "a", "d")
    assert len(slots) == 3
    assert held(slots, "abcd") == "acd"


def test_more_keys_in_turn_than_slots_drive_nobody_out() -> None:
    """Keys that come again within the patience stay, and the others never get in: nothing is recorded over and over."""
    slots: Slots[str, int] = Slots(most=3, patience=10)
    for _ in range(20):
        put(slots, "a", "b", "c", "d", "e")
    assert held(slots, "abcde") == "abc"


def test_a_key_that_nobody_wants_any_more_makes_room() -> None:
    """After `patience` look-ups without it, and not before."""
    slots: Slots[str, int] = Slots(most=2, patience=4)
    put(slots, "a", "b", "b", "b", "c")
    assert held(slots, "c") == ""
    put(slots, "c")
    assert len(slots) == 2
    assert held(slots, "bca") == "bc"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_replay_answers_as_the_network(tmp_path) -> None:
    """The first batch of a shape, later ones, and those of a shape without a graph: the scores of PyTorch as it is, in
    float32 and in bfloat16; an answer does not change when the next one is computed."""
    device = torch.device("cuda")
    url = write_lively_bundle(str(tmp_path / "bundle"))
    batches = [np.stack([town.draw(seed, *size)[0]] * 2) for seed, size in enumerate([(64, 96), (64, 96), (48, 64)])]
    for precision in ("fp32", "bf16"):
        plain, graphed = (
            runtimes.start(name, bundle.load(url), device, precision=precision) for name in ("torch", "cuda_graph")
        )
        answers = [graphed(batch) for batch in batches]
        few = GraphedScores(plain, device, most=1)
        answers += [few(torch.from_numpy(batch)) for batch in batches]
        for answer, batch in zip(answers, [*batches, *batches], strict=True):
            assert answer.dtype == torch.float32
            torch.testing.assert_close(answer, plain(batch), rtol=1e-2, atol=1e-2)
