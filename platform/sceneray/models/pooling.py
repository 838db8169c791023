"""Pyramid pooling (Zhao et al., CVPR 2017): averages over coarse grids, brought back to the map's size.

B batch, C channels, H W height and width of the map, N cells along a side of the pooling grid (a "bin").

All resizing here and in pspnet.py is bilinear with align_corners=False. A pooled cell is the mean of an area and has
its centre in the middle of that area, which is where align_corners=False puts it; align_corners=True would pull the
outer cells to the map's border. It also needs no rule for the input's size (align_corners=True fits inputs of 8n + 1
pixels, hszhao/semseg's rule).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sceneray.models.backbones import NormLayer


class PyramidPooling(nn.Module):
    """The map itself and, for each bin, its averages through a 1×1 convolution, norm and ReLU, side by side.

    `out_channels` is channels + len(bins) × width; order [x, bins[0], bins[1], ...], as the authors' code has it.
    """

    def __init__(self, channels: int, bins: Sequence[int], width: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.out_channels = channels + len(self.bins) * width
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), norm_layer(width), nn.ReLU(inplace=True))
            for _ in self.bins
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, out_channels, H, W], float."""
        size = x.shape[-2:]
        maps = [x]
        for cells, branch in zip(self.bins, self.branches, strict=True):
            pooled = branch(adaptive_average(x, cells))
            maps.append(F.interpolate(pooled, size=size, mode="bilinear", align_corners=False))
        return torch.cat(maps, dim=1)


def adaptive_average(x: Tensor, cells: int) -> Tensor:
    """Adaptive average pooling as two matrix products: [B, C, H, W] → [B, C, N, N] with N = cells.

    Equals F.adaptive_avg_pool2d. Unlike it, it exports to ONNX where N does not divide H or W (pytorch #42653), and its
    gradient on CUDA is deterministic. 16-bit maps are averaged in 32 bits: 1/60 has an error of 0.2 % in bfloat16.
    """
    height, width = x.shape[-2:]
    with torch.autocast(x.device.type, enabled=False):
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        rows = averaging_matrix(height, cells, wide)
        columns = averaging_matrix(width, cells, wide)
        return (rows @ wide @ columns.T).to(x.dtype)


def averaging_matrix(size: int, cells: int, like: Tensor) -> Tensor:
    """[N, size] with N = cells: row i averages positions floor(i·size/N) to ceil((i+1)·size/N); each row sums to 1.

    dtype and device are those of `like`. Made of device operations only, so that `size` may be symbolic in an export.
    """
    cell = torch.arange(cells, device=like.device)[:, None]
    position = torch.arange(size, device=like.device)
    start = cell * size // cells
    end = ((cell + 1) * size + cells - 1) // cells
    inside = (position >= start) & (position < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)
