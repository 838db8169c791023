"""Which sample comes when."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sceneray.data import order

# Recorded when the format was made; a change of the order function must fail here.
EXPECTED_GLOBAL = [4, 0, 5, 6, 2, 3, 1]
EXPECTED_BLOCK = [1, 0, 2, 4, 5, 3, 6]
EXPECTED_SEED = 561729023602754581
SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
KINDS = st.sampled_from(["global", "block"])


@given(SHARDS, st.integers(0, 2**32), KINDS, st.integers(1, 50), st.integers(0, 5))
def test_every_sample_comes_exactly_once_an_epoch(
    shards: list[int], seed: int, kind: str, window: int, epoch: int
) -> None:
    """An epoch is a permutation of all samples, whatever the kind of order."""
    samples = order.SampleOrder(shards, seed, kind, window)
    assert sorted(samples.epoch(epoch)) == list(range(sum(shards)))


@given(SHARDS, st.integers(0, 2**32), KINDS)
def test_a_position_means_the_same_sample_however_it_is_reached(shards: list[int], seed: int, kind: str) -> None:
    """Walking there, jumping there and coming back give one sample: position is the whole state."""
    size = sum(shards)
    walked = [order.SampleOrder(shards, seed, kind)[p] for p in range(3 * size)]
    jumping = order.SampleOrder(shards, seed, kind)
    backwards = [jumping[p] for p in reversed(range(3 * size))]
    assert walked == backwards[::-1]


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or another seed is another order."""
    orders = [tuple(order.SampleOrder([50], seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_does_not_change_between_releases() -> None:
    """A run that is resumed by a newer version sees the same samples: these numbers stay for ever."""
    assert order.SampleOrder([7], seed=1).epoch(0).tolist() == EXPECTED_GLOBAL
    assert order.SampleOrder([3, 4], seed=1, kind="block", window=3).epoch(2).tolist() == EXPECTED_BLOCK
    assert order.dropout_seed(3, 4) == EXPECTED_SEED


def test_block_order_stays_within_its_window() -> None:
    """Any window of a block order comes from the few shards that cover it."""
    shards = [10] * 20
    samples = order.SampleOrder(shards, seed=5, kind="block", window=20).epoch(0)
    for start in range(0, 200, 20):
        assert len({int(index) // 10 for index in samples[start : start + 20]}) == 2


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(1, 4))
def test_ranks_and_passes_split_a_batch_without_loss(size: int, batch: int, ranks: int, passes: int) -> None:
    """The parts of all ranks and passes are the batch, in its order, for any number of them."""
    for step in range(order.total_steps(size, batch)):
        whole = order.step_positions(step, batch, size)
        parts = [
            order.share(order.share(whole, rank, ranks), part, passes)
            for rank in range(ranks)
            for part in range(passes)
        ]
        assert list(itertools.chain(*parts)) == list(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 2


@given(st.integers(1, 100), st.floats(0.1, 6), st.integers(1, 32))
def test_batches_run_on_over_epoch_ends(size: int, epochs: float, batch: int) -> None:
    """Only the run's last batch may be smaller than the batch size."""
    positions = order.total_positions(size, epochs)
    lengths = [len(order.step_positions(s, batch, positions)) for s in range(order.total_steps(positions, batch))]
    assert sum(lengths) == positions
    assert all(length == batch for length in lengths[:-1])


@pytest.mark.parametrize(
    ("size", "batch", "epochs", "every", "expected"),
    [
        (10, 5, 3, 1, [2, 4, 6]),
        (10, 4, 3, 1, [3, 5, 8]),  # an epoch that ends inside a step is over after that step
        (10, 5, 5, 2, [4, 8, 10]),  # the run's end is always evaluated
        (10, 5, 0.5, 1, [1]),
    ],
)
def test_evaluation_follows_epochs(size: int, batch: int, epochs: float, every: int, expected: list[int]) -> None:
    """Evaluation comes after the step that completes an epoch, and at the end."""
    assert order.evaluation_steps(size, batch, order.total_positions(size, epochs), every) == expected


def test_augmentation_is_bound_to_the_position() -> None:
    """The same position draws the same numbers, its neighbours and other seeds others."""
    draws = {key: order.augmentation_rng(*key).random(4).tolist() for key in [(0, 0), (0, 1), (1, 0)]}
    assert order.augmentation_rng(0, 1).random(4).tolist() == draws[0, 1]
    assert len({tuple(values) for values in draws.values()}) == 3
    assert all(0 <= value < 1 for value in np.ravel(list(draws.values())))
