"""Channel dropout whose mask is a function of the sample, so that it can be repeated anywhere.

Dropout that draws from a global generator depends on the batch, the rank and everything drawn before. Here a mask is
computed from (seed of the sample, layer, channel) alone: the same sample loses the same channels in any batch, on any
worker, on a CPU or a GPU, before or after a resume.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sceneray.errors import ConfigError, DataError

_MASK = 0xFFFFFFFF


class ChannelDropout(nn.Module):
    """Whole channels set to zero with probability `p` in training, the others scaled by 1 / (1 - p).

    After Tompson et al. (CVPR 2015, "SpatialDropout"); nn.Dropout2d is the same with a global generator. `layer` names
    this layer among those of a network: layers with different numbers draw independently.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {p}.")
        self.p = p
        self.layer = layer

    def forward(self, x: Tensor, sample_seeds: Tensor | None = None) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]; sample_seeds: int64 [B]; without them the global generator decides."""
        if not self.training or self.p == 0:
            return x
        if sample_seeds is None:
            return F.dropout2d(x, self.p, training=True)
        if sample_seeds.shape != x.shape[:1]:
            raise DataError(
                f"there must be one seed per sample: got seeds of shape {list(sample_seeds.shape)} for a batch of "
                f"{x.shape[0]}."
            )
        keep = keep_mask(sample_seeds.to(x.device), self.layer, x.shape[1], self.p)
        return x * (keep.to(x.dtype) / (1 - self.p))[:, :, None, None]

    def extra_repr(self) -> str:
        """Probability and layer number."""
        return f"p={self.p}, layer={self.layer}"


def keep_mask(sample_seeds: Tensor, layer: int, channels: int, p: float) -> Tensor:
    """bool [B, C], True where a channel stays; sample_seeds: int64 [B], any value.

    The words of (seed, layer, channel) are folded into one 32-bit hash, `h = mix(h ^ word)`, and compared with p · 2³².
    Integer arithmetic throughout: no device rounds it differently.
    """
    h = mix((sample_seeds & _MASK) ^ 0x9E3779B9)  # an offset, because mix(0) is 0
    h = mix(h ^ ((sample_seeds >> 32) & _MASK))
    h = mix(h ^ (layer & _MASK))
    channel = torch.arange(channels, device=sample_seeds.device)
    return mix(h[:, None] ^ channel) >= round(p * 2**32)


def mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (Austin Appleby, public domain) on int64 tensors that hold 0 .. 2³² - 1.

    https://github.com/aappleby/smhasher/blob/master/src/MurmurHash3.cpp (fmix32). A bijection in which each bit of the
    input changes each bit of the output with probability one half.
    """
    h = _multiply(h ^ (h >> 16), 0x85EBCA6B)
    h = _multiply(h ^ (h >> 13), 0xC2B2AE35)
    return h ^ (h >> 16)


def _multiply(h: Tensor, constant: int) -> Tensor:
    # Less 2³², which changes nothing modulo 2³², a constant above 2³¹ keeps the product within int64.
    return (h * (constant - 2**32)) & _MASK
