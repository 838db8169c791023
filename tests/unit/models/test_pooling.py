"""Pyramid pooling and the averages written as matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sceneray.models.norm import BatchNorm2d
from sceneray.models.pooling import PyramidPooling, adaptive_average, averaging_matrix

sides = st.integers(1, 40)


@given(height=sides, width=sides, cells=st.integers(1, 9))
def test_equals_adaptive_average_pooling(height: int, width: int, cells: int) -> None:
    """At any size and any bin, also bins larger than the map, the values are those of F.adaptive_avg_pool2d."""
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    torch.testing.assert_close(adaptive_average(x, cells), F.adaptive_avg_pool2d(x, cells), rtol=1e-5, atol=1e-6)


@given(size=sides, cells=st.integers(1, 9))
def test_rows_are_averages(size: int, cells: int) -> None:
    """Each row of an averaging matrix is non-negative and sums to 1, so that a constant map stays constant."""
    matrix = averaging_matrix(size, cells, torch.zeros(1, dtype=torch.float64))
    assert matrix.shape == (cells, size)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(cells, dtype=torch.float64))


def test_gradient_equals_adaptive_average_poolings() -> None:
    """The gradient is that of F.adaptive_avg_pool2d."""
    x = torch.randn(1, 2, 7, 10, requires_grad=True)
    weights = torch.randn(1, 2, 3, 3)
    ours = torch.autograd.grad((adaptive_average(x, 3) * weights).sum(), x)[0]
    reference = torch.autograd.grad((F.adaptive_avg_pool2d(x, 3) * weights).sum(), x)[0]
    torch.testing.assert_close(ours, reference)


def test_sixteen_bit_maps_are_averaged_in_thirty_two() -> None:
    """In bfloat16, under autocast too, a mean over 60 × 60 is the true mean rounded once."""
    x = torch.full((1, 1, 60, 60), 3.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = adaptive_average(x, 1)
    assert pooled.dtype == torch.bfloat16
    assert pooled.item() == 3.0


def test_the_map_comes_first_and_then_each_bin() -> None:
    """The output is [x, bins in order], each branch constant on the map where its bin is 1."""
    pyramid = PyramidPooling(4, (1, 2), 3, BatchNorm2d).eval()
    x = torch.randn(2, 4, 9, 5)
    out = pyramid(x)
    assert out.shape == (2, pyramid.out_channels, 9, 5)
    assert pyramid.out_channels == 4 + 2 * 3
    assert torch.equal(out[:, :4], x)
    global_mean = pyramid.branches[0](x.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(out[:, 4:7], global_mean.expand(2, 3, 9, 5), rtol=1e-5, atol=1e-6)
    assert out[:, 7:].std(dim=(2, 3)).max() > 0


def test_a_linear_map_comes_back_in_place() -> None:
    """A ramp through a branch that changes nothing is the same ramp between the outer cells' centres."""
    pyramid = PyramidPooling(1, (6,), 1, lambda _: nn.Identity())
    nn.init.ones_(pyramid.branches[0][0].weight)
    ramp = torch.arange(24.0).expand(1, 1, 24, 24)
    back = pyramid(ramp)[:, 1:]
    torch.testing.assert_close(back[..., 2:-2], ramp[..., 2:-2])


class Pool(nn.Module):
    """One bin that divides neither side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, C, 6, 6]."""
        return adaptive_average(x, 6)


def test_exports_at_a_size_that_no_bin_divides() -> None:
    """The exported graph pools 45 × 61 into 6 × 6 with the same numbers and without an adaptive pooling operator."""
    x = torch.randn(1, 2, 45, 61)
    program = torch.export.export(Pool(), (x,))
    torch.testing.assert_close(program.module()(x), F.adaptive_avg_pool2d(x, 6), rtol=1e-5, atol=1e-6)
    assert "adaptive" not in str(program.graph)
