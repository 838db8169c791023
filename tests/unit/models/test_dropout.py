"""Channel dropout: masks that depend on the sample, the layer and the channel, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from sceneray.errors import ConfigError, DataError
from sceneray.models.dropout import ChannelDropout, keep_mask, mix

SEEDS = torch.randint(-(2**63), 2**63 - 1, (2000,), generator=torch.Generator().manual_seed(0))


def test_hash_is_murmurhash3s_finaliser() -> None:
    """The hash gives the published values: MurmurHash3_x86_32 of nothing with seeds 0, 1 and 2³² - 1."""
    assert mix(torch.tensor([0, 1, 0xFFFFFFFF])).tolist() == [0, 0x514E28B7, 0x81F16F39]


def test_hash_equals_unsigned_arithmetic() -> None:
    """On int64 tensors the hash is what exact integers modulo 2³² give."""

    def reference(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return h ^ (h >> 16)

    values = (SEEDS & 0xFFFFFFFF).tolist()
    assert mix(torch.tensor(values)).tolist() == [reference(value) for value in values]


def test_a_sample_keeps_its_mask_in_any_batch() -> None:
    """The same sample loses the same channels alone, in a batch, in another order and after other random draws."""
    dropout = ChannelDropout(0.5, layer=0).train()
    x = torch.randn(4, 64, 3, 3)
    together = dropout(x, SEEDS[:4])
    torch.manual_seed(123)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(dropout(x[order], SEEDS[:4][order]), together[order])
    assert torch.equal(dropout(x[1:2], SEEDS[1:2]), together[1:2])


def test_whole_channels_are_dropped_and_the_rest_scaled() -> None:
    """A channel is zero everywhere or scaled by 1 / (1 - p) everywhere."""
    out = ChannelDropout(0.25, layer=0).train()(torch.ones(8, 32, 4, 5), SEEDS[:8])
    channels = out.flatten(2)
    assert torch.equal(channels.amin(2), channels.amax(2))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_p_and_the_mean_is_kept(p: float) -> None:
    """Over 2000 samples the rate is p within five standard errors, for each of 256 channels too, and the mean stays."""
    keep = keep_mask(SEEDS, 0, 256, p).double()
    error = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * error / keep.numel() ** 0.5
    assert (keep.mean(0) - (1 - p)).abs().max() < 5 * error / len(SEEDS) ** 0.5
    out = ChannelDropout(p, layer=0).train()(torch.ones(2000, 256, 1, 1), SEEDS)
    assert abs(out.double().mean() - 1) < 5 * error / (1 - p) / keep.numel() ** 0.5


def test_consecutive_seeds_layers_and_channels_are_independent() -> None:
    """At p = 0.5 masks of neighbouring seeds, layers and channels agree in half of the places, as independent ones."""
    seeds = torch.arange(2000)
    first, second = keep_mask(seeds, 0, 256, 0.5), keep_mask(seeds, 1, 256, 0.5)
    tolerance = 5 * 0.5 / (1999 * 255) ** 0.5
    high = keep_mask(seeds << 32, 0, 256, 0.5)  # seeds that differ in their upper half alone
    pairs = ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (high[1:], high[:-1]))
    for a, b in pairs:
        assert abs((a == b).double().mean() - 0.5) < tolerance


def test_without_seeds_the_global_generator_decides() -> None:
    """Without seeds two calls differ, and the same torch seed repeats them; in evaluation nothing is dropped."""
    dropout = ChannelDropout(0.5, layer=0).train()
    x = torch.ones(2, 64, 2, 2)
    torch.manual_seed(0)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x, SEEDS[:2]), x)


def test_bad_arguments_are_named() -> None:
    """A probability of 1 and a number of seeds unlike the batch are refused with what came."""
    with pytest.raises(ConfigError, match="below 1, got 1"):
        ChannelDropout(1.0, layer=0)
    with pytest.raises(DataError, match=r"\[3\] for a batch of 2"):
        ChannelDropout(0.5, layer=0).train()(torch.ones(2, 4, 1, 1), SEEDS[:3])
