"""The few collective operations of a training run; each does nothing in a run of one process."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sceneray.models.pspnet import PSPNet


def distributed(model: PSPNet, device: torch.device, world_size: int) -> DistributedDataParallel | None:
    """The network wrapped by DDP, or None in a run of one process.

    DDP's default stays on: every rank starts a step from rank 0's running statistics, the ones that are saved.
    """
    if world_size == 1:
        return None
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def settle_buckets(ddp: DistributedDataParallel, example: tuple[Tensor, Tensor]) -> None:
    """Two passes forward and back that change nothing, before training's state is loaded.

    DDP groups gradients into buckets anew after its first pass. With three ranks and more the grouping decides the
    order of summation, so a resumed run would sum its first step in another order than the run that was never stopped.
    `example` is the network's input: images and dropout seeds.
    """
    buffers = [buffer.clone() for buffer in ddp.module.buffers()]
    for _ in range(2):
        logits = ddp(*example)
        outputs = [logits.main] if logits.aux is None else [logits.main, logits.aux]
        (torch.stack([output.float().sum() for output in outputs]).sum() * 0).backward()
    ddp.zero_grad(set_to_none=True)
    for buffer, before in zip(ddp.module.buffers(), buffers, strict=True):
        buffer.copy_(before)


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


def share_texts(text: str, device: torch.device, world_size: int) -> list[str]:
    """Every rank's text (up to 255 bytes of UTF-8; the rest is cut), in the order of ranks."""
    if world_size == 1:
        return [text]
    data = text.encode()[:255]
    mine = torch.zeros(256, dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
    every = [torch.zeros_like(mine, device=device) for _ in range(world_size)]
    dist.all_gather(every, mine.to(device))
    return [bytes(row.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for row in every]


def gather_positions(positions: list[int], most: int, device: torch.device, world_size: int) -> list[list[int]]:
    """Every rank's list of non-negative integers, at most `most` each, in the order of ranks."""
    if world_size == 1:
        return [positions]
    mine = torch.tensor(positions + [-1] * (most - len(positions)), dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(every, mine)
    return [[value for value in row.tolist() if value >= 0] for row in every]


def share_buffers(model: nn.Module, world_size: int) -> None:
    """Give every rank rank 0's buffers (running statistics), so that all evaluate the network that is saved."""
    if world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
