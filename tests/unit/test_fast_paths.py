"""What makes a step fast is on: gradients lie in DDP's buckets and are summed once, and nobody waits for a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from sceneray import steps
from sceneray.config import TrainSettings
from sceneray.steps import Runtime
from tests.ranks import first_step, process_group
from tests.stores import tiny_settings


def count_reductions(rank: int, folder: str, settings: list[TrainSettings]) -> None:
    """One of two ranks: how often DDP summed a bucket in one step of each of `settings`, and where gradients lie."""
    found: dict[str, Any] = {"reductions": []}
    with process_group(rank, 2, folder):
        for one in settings:
            state, batches = first_step(one, Runtime(rank=rank, world_size=2, workers_here=2))
            steps.settle(state)
            seen: list[int] = []

            def hook(_, bucket, seen=seen):  # DDP refuses annotations that are strings
                seen.append(bucket.index())
                return allreduce_hook(None, bucket)

            assert state.ddp is not None
            state.ddp.register_comm_hook(None, hook)
            steps.train_step(state, batches)
            found["reductions"].append(len(seen))
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            found["gradients"] = len(gradients)
            found["storages"] = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
            found["buckets"] = len(set(seen))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def test_gradients_are_summed_once_a_step_in_their_buckets(store: str, tmp_path: Path) -> None:
    """With two passes a step DDP sums as often as with one, and gradients are views of its buckets, no copies."""
    settings = [tiny_settings(store, str(tmp_path), "batch_size=4", f"accumulate={n}", "workers=2") for n in (1, 2)]
    torch.multiprocessing.spawn(count_reductions, (str(tmp_path), settings), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    once, twice = found["reductions"]
    assert once == twice == found["buckets"]
    assert found["storages"] == found["buckets"] < found["gradients"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_asks_for_no_value(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Within a step no tensor becomes a Python number: on a GPU each would wait for the device."""
    state, batches = first_step(
        tiny_settings(store, str(tmp_path), f"optimizer.name={optimizer}", "ema=0.9"), Runtime()
    )

    def waits(_: Tensor) -> Any:
        raise AssertionError("a step waits for the device")

    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, name, waits)
    totals = steps.train_step(state, batches)
    monkeypatch.undo()
    assert totals[1] > 0


def test_channels_last_and_fused(store: str, tmp_path: Path) -> None:
    """Weights lie channels last, their gradients and momenta too, and the optimizer is one kernel for all of them."""
    state, batches = first_step(tiny_settings(store, str(tmp_path)), Runtime())
    steps.train_step(state, batches)
    assert state.optimizer.defaults["fused"] is True
    convolutions = [p for p in state.model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert len(convolutions) > 10
    for weight in convolutions:
        for tensor in (weight, weight.grad, state.optimizer.state[weight]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
