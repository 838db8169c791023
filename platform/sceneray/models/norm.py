"""Batch normalisation (Ioffe & Szegedy, ICML 2015) whose statistics come from one worker, all workers, or the past.

B batch, C channels, H W height and width. A channel has B·H·W values; in `sync` mode those of all workers count.

PyTorch raises on one value per channel ("Expected more than 1 value per channel"), which PSPNet's 1×1 bin meets with
one image per worker. Here such a layer normalises with its running statistics and does not change them in that step.

PyTorch's SyncBatchNorm refuses CPU tensors; `sync` here runs on any backend that can gather and reduce (gloo, nccl).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sceneray.errors import ConfigError, unknown_name

MODES = ("local", "sync", "frozen")


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d (same parameters, buffers and defaults) with a `mode` for training.

    - `local`: statistics of this worker's batch. Results depend on how a batch is split over workers.
    - `sync`: statistics of all workers' batches, also uneven ones: up to rounding the result of one worker with all.
    - `frozen`: the running statistics, which never change; scale and shift still learn. A layer that was never trained
      then only scales and shifts.

    In evaluation all three use the running statistics.
    """

    def __init__(self, num_features: int, mode: str = "local") -> None:
        if mode not in MODES:
            raise ConfigError(unknown_name("norm", mode, MODES))
        super().__init__(num_features)
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class names it so)
        """[B, C, H, W] → [B, C, H, W]; float32, or 16-bit with statistics in 32 bits."""
        if not self.training or self.mode == "frozen":
            return self._by_running_statistics(input)
        if self.mode == "sync" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self._synchronised(input)
        if values_per_channel(input) <= 1:
            return self._by_running_statistics(input)
        return super().forward(input)

    def extra_repr(self) -> str:
        """Channels, constants and mode."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, mode={self.mode}"

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _synchronised(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            mean, squares, count = global_moments(x)
            # Decided on the device: reading `count` on the host would make every layer wait for the GPU.
            enough = count > 1
            mean = torch.where(enough, mean, self.running_mean)
            var = torch.where(enough, squares / count, self.running_var)
            unbiased = torch.where(enough, squares / (count - 1).clamp(min=1), self.running_var)
            share = torch.where(enough, 1 / count, torch.zeros_like(count))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        normalised: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, var, share, self.eps)
        return normalised


def values_per_channel(x: Tensor) -> int:
    """B·H·W of a map [B, C, H, W]."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [C], sum of squared deviations from it [C], count []) over the maps [B, C, H, W] of all workers.

    Each worker takes its own mean and squared deviations; one gather brings them together by the update of Chan, Golub
    & LeVeque (1983). Unlike E[x²] - E[x]² this keeps its digits where the mean is far from zero. Every worker combines
    the same numbers in the same order, so all get the same bits. A worker without images counts as none.
    """
    x = _wide(x)
    channels = x.shape[1]
    own = x.new_zeros(2 * channels + 1)
    own[-1] = values_per_channel(x)
    if values_per_channel(x) > 0:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        own[:channels] = mean
        own[channels:-1] = var * own[-1]
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    table = torch.stack(gathered)  # one row a worker
    means, squares, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    count = counts.sum()
    pivot = means[0]  # differences to a worker's mean are small: their rounding is too
    mean = pivot + (counts * (means - pivot)).sum(0) / count
    return mean, (squares + counts * (means - mean) ** 2).sum(0), count


class _Normalise(torch.autograd.Function):
    """Batch norm with given moments, whose gradient knows that the moments came from the values of all workers.

    share: 1 / number of values per channel over all workers, or 0 where the moments do not depend on the values. The
    gradients of scale and shift are this worker's own: summing them is DDP's work, as for every parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, share: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), share)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, share = ctx.saved_tensors
        grad = _wide(grads[0])
        centred = _wide(x) - _as_map(mean)
        grad_sum = grad.sum((0, 2, 3))
        grad_dot = (grad * centred).sum((0, 2, 3))
        grad_x = None
        if ctx.needs_input_grad[0]:
            totals = torch.cat([grad_sum, grad_dot])
            dist.all_reduce(totals)
            total_sum, total_dot = totals.chunk(2)
            centred *= _as_map(total_dot * share * inverse_std**2)
            grad_x = (grad - _as_map(total_sum * share) - centred) * _as_map(inverse_std * weight)
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad_dot * inverse_std, grad_sum, None, None, None, None


def _as_map(values: Tensor) -> Tensor:
    """[C] → [1, C, 1, 1]."""
    return values[None, :, None, None]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
