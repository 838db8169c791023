"""The few collective operations of a training run; each does nothing in a run of one process."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sceneray.models.pspnet import PSPNet


def distributed(model: PSPNet, device: torch.device, world_size: int) -> nn.Module:
    """The network as DDP runs it, or itself in a run of one process.

    DDP's default stays on: every rank starts a step from rank 0's running statistics, the ones that are saved.
    """
    if world_size == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def sum_over_ranks(values: Tensor, world_size: int) -> Tensor:
    """`values` summed over all ranks, in place."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def sum_matrix(matrix: np.ndarray, device: torch.device, world_size: int) -> np.ndarray:
    """An int64 matrix summed over all ranks."""
    if world_size == 1:
        return matrix
    total: np.ndarray = sum_over_ranks(torch.from_numpy(matrix).to(device), world_size).cpu().numpy()
    return total


def share_integers(values: list[int], device: torch.device, world_size: int) -> list[int]:
    """Rank 0's integers, on every rank; all ranks give equally many."""
    if world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return [int(value) for value in tensor.tolist()]


def share_buffers(model: nn.Module, world_size: int) -> None:
    """Give every rank rank 0's buffers (running statistics), so that all evaluate the network that is saved."""
    if world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
