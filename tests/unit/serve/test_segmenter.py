"""A model replica without Ray: exact and fast batches, input rules, little memory, deadlines and health."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sceneray import bundle
from sceneray.data import town
from sceneray.errors import BundleError, DataError, ServingError
from sceneray.masks import Mask, Photo
from sceneray.models.pspnet import upscale
from sceneray.predictor import Predictor
from serve.batching import Limits, OutOfMemory, TooLate
from serve.runner import Item, Runner
from serve.schemas import Ask, Rules, Segmented
from serve.segmenter import Segmenter
from tests.bundles import agree, half_bright, write_bundle, write_lively_bundle

LIMITS = Limits(max_items=4, max_cost=2**22, max_queued_cost=2**24, max_wait_s=0.02)
SHAPES = ((48, 64), (64, 48), (57, 83), (40, 40))
CLASSES = town.CLASSES


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle with random weights and lively logits, windows of 48 pixels and a shape to warm."""
    url = str(tmp_path_factory.mktemp("network") / "bundle")
    return write_lively_bundle(url, input={"rule": "native", "window": 48, "warm": [[48, 64]]})


def photos(count: int) -> list[Photo]:
    """Drawn scenes of four shapes in turn."""
    return [town.draw(seed, *SHAPES[seed % len(SHAPES)])[0] for seed in range(count)]


def answers(segmenter: Segmenter, images: Sequence[Photo], together: int, ask: Ask | None = None) -> list[Segmented]:
    """The answers to `images`, at most `together` on their way at a time."""

    async def work() -> list[Segmented]:
        room = asyncio.Semaphore(together)

        async def one(image: Photo) -> Segmented:
            async with room:
                return await segmenter.segment(image, ask)

        return await asyncio.gather(*(one(image) for image in images))

    return asyncio.run(work())


@pytest.mark.parametrize("exact_batch", [1, 4])
def test_exact_answers_are_the_same_bytes_whatever_runs_beside(network: str, exact_batch: int) -> None:
    """Masks and confidences of 24 photographs of four shapes, 12 at a time, equal those of one at a time."""
    segmenter = Segmenter.load(network, LIMITS, "cpu", rules=Rules("exact", exact_batch))
    images = photos(24)
    together = answers(segmenter, images, 12, Ask(confidence=True))
    alone = answers(segmenter, images, 1, Ask(confidence=True))
    for beside, single in zip(together, alone, strict=True):
        assert np.array_equal(beside.mask, single.mask)
        assert beside.confidence is not None
        assert single.confidence is not None
        assert np.array_equal(beside.confidence, single.confidence)
    assert max(answer.batch_size for answer in together) == exact_batch


def test_fast_answers_differ_at_ties_alone(network: str) -> None:
    """A pixel may differ from the single answer only where its two best scores lie within 1e-4 of their spread."""
    segmenter = Segmenter.load(network, LIMITS, "cpu", rules=Rules("fast"))
    predictor = Predictor.load(network, "cpu")
    images = photos(24)
    differing = pixels = 0
    for image, answer in zip(images, answers(segmenter, images, 12), strict=True):
        scores = upscale(predictor.scores([image]), image.shape[:2])[0]
        best = scores.topk(2, dim=0).values
        tie = ((best[0] - best[1]) < 1e-4 * scores.std()).numpy()
        differs = answer.mask != scores.argmax(dim=0).numpy()
        assert not (differs & ~tie).any()
        differing, pixels = differing + int(differs.sum()), pixels + differs.size
    print(f"\n{differing} of {pixels} pixels differ from the single answer")


def test_a_resized_photo_comes_back_at_its_own_size(network: str) -> None:
    """The network sees a long side of 48 pixels; the mask has the photograph's shape and the scaled scores' classes."""
    segmenter = Segmenter.load(network, LIMITS, "cpu", rules=Rules(long_side=48))
    image = town.draw(1, 96, 128)[0]
    answer = answers(segmenter, [image], 1, Ask(rule="resize"))[0]
    assert answer.mask.shape == (96, 128)
    small = answers(segmenter, [image[:40, :40]], 1, Ask(rule="resize"))[0]
    assert np.array_equal(small.mask, Predictor.load(network, "cpu").predict([image[:40, :40]])[0]), "never enlarged"
    with pytest.raises(DataError, match="no long side"):
        answers(Segmenter.load(network, LIMITS, "cpu"), [image], 1, Ask(rule="resize"))


def test_windows_answer_as_adding_them_up_by_hand(network: str) -> None:
    """A photograph in windows equals the sum of its windows' probabilities; the bundle names their side."""
    segmenter = Segmenter.load(network, LIMITS, "cpu")
    predictor = Predictor.load(network, "cpu")
    image = town.draw(2, 70, 131)[0]
    total = torch.zeros(len(CLASSES), 70, 131)
    for top in (0, 22):
        for left in (0, 32, 64, 83):
            tile = np.ascontiguousarray(image[top : top + 48, left : left + 48])
            found = upscale(predictor.scores([tile]), (48, 48))[0].softmax(dim=0)
            total[:, top : top + 48, left : left + 48] += found
    answer = answers(segmenter, [image], 1, Ask(rule="window", confidence=True))[0]
    assert np.array_equal(answer.mask, total.argmax(dim=0).numpy())
    assert answer.confidence is not None
    assert answer.confidence.shape == (70, 131)


def test_windows_of_photos_of_any_size_share_passes(network: str) -> None:
    """Eight photographs of eight sizes, one smaller than the window: their tiles run in full batches."""
    segmenter = Segmenter.load(network, LIMITS, "cpu", rules=Rules("exact", 4, input="window"))
    images = [town.draw(seed, 40 + 7 * seed, 60 + 5 * seed)[0] for seed in range(8)]
    found = answers(segmenter, images, 8)
    assert [answer.mask.shape for answer in found] == [image.shape[:2] for image in images]
    assert max(answer.batch_size for answer in found) == 4
    alone = answers(segmenter, images, 1)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(found, alone, strict=True))


class SmallDevice(Predictor):
    """A predictor whose device holds two images and no more."""

    passes: list[int]

    def scores(self, images: Sequence[Photo], pad_to: int = 1) -> Tensor:
        """As the real one, but for what does not fit."""
        count = max(len(images), pad_to)
        self.passes = [*getattr(self, "passes", []), count]
        if count > 2 or images[0].shape[0] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().scores(images, pad_to)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_batch_that_does_not_fit_is_split(network: str, mode: Any) -> None:
    """Four images run as two and two, and from then on at once; one that does not fit alone is refused by its size."""
    predictor = SmallDevice(bundle.load(network), "cpu")
    runner = Runner(predictor, mode, exact_batch=4)
    images = [town.draw(seed, 48, 64)[0] for seed in range(4)]
    items = [Item(image, (48, 64)) for image in images]
    outcomes = runner.run(items)
    expected = Predictor.load(network, "cpu").predict(images)
    assert all(np.array_equal(outcome.mask, mask) for outcome, mask in zip(outcomes, expected, strict=True))
    assert predictor.passes == [4, 2, 2]
    runner.run(items)
    assert predictor.passes == [4, 2, 2, 2, 2]
    with pytest.raises(OutOfMemory, match="64 × 48"):
        runner.run([Item(town.draw(0, 64, 48)[0], (64, 48))])


def test_a_deadline_that_passed_is_not_computed(network: str) -> None:
    """What waits behind a long pass past its deadline is told so, and never run; the rest is answered."""
    release, ran = threading.Event(), []

    class Slow(Predictor):
        def scores(self, images: Sequence[Photo], pad_to: int = 1) -> Tensor:
            ran.append(images[0].shape[0])
            assert release.wait(20)
            return super().scores(images, pad_to)

    async def work() -> list[Any]:
        segmenter = Segmenter(Slow(bundle.load(network), "cpu"), LIMITS, Rules(warm=()))
        images = [town.draw(0, side, 48)[0] for side in (40, 48, 56)]
        first = asyncio.ensure_future(segmenter.segment(images[0]))
        while not ran:
            await asyncio.sleep(0.01)  # until the first is on the model
        late = asyncio.ensure_future(segmenter.segment(images[1], Ask(deadline=time.time() + 0.2)))
        patient = asyncio.ensure_future(segmenter.segment(images[2], Ask(deadline=time.time() + 60)))
        await asyncio.sleep(0.4)  # the deadline passes
        release.set()
        return await asyncio.gather(first, late, patient, return_exceptions=True)

    first, late, patient = asyncio.run(work())
    assert isinstance(first, Segmented)
    assert isinstance(late, TooLate)
    assert isinstance(patient, Segmented)
    assert ran == [40, 56]


def test_a_stuck_model_is_unhealthy(network: str) -> None:
    """A model that answers is healthy, one whose passes never end is not, whatever waits in its queue."""
    release = threading.Event()

    class Stuck(Predictor):
        def scores(self, images: Sequence[Photo], pad_to: int = 1) -> Tensor:
            release.wait(20)
            return super().scores(images, pad_to)

    async def work() -> None:
        await Segmenter.load(network, LIMITS, "cpu").check(within_s=5)
        segmenter = Segmenter(Stuck(bundle.load(network), "cpu"), LIMITS, Rules(warm=()))
        segmenter._passed_at -= 60  # nothing was asked for a minute
        with pytest.raises(ServingError, match="golden image"):
            await segmenter.check(within_s=0.3)
        release.set()
        await segmenter.check(within_s=20)

    asyncio.run(work())


def test_passes_step_back_for_http(network: str) -> None:
    """With `nice` the threads that compute a pass, the runtime's own among them, have a lower priority; the caller's
    thread, where HTTP may run, keeps its own."""

    def niceness() -> list[int]:
        tasks = [int(name) for name in os.listdir("/proc/self/task")]
        return [os.getpriority(os.PRIO_PROCESS, task) for task in tasks]

    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    segmenter = Segmenter.load(network, LIMITS, "cpu", threads=2, rules=Rules(nice=11))
    answers(segmenter, photos(4), 4)
    assert niceness().count(11) >= 2, "the thread of the pass and one that torch started for it"
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here < 11


def test_a_replaced_model_answers_what_it_was_asked(network: str, tmp_path: Path) -> None:
    """Requests from before the change are answered by the old model, later ones by the new; none fails."""
    segmenter = Segmenter.load(write_bundle(str(tmp_path / "bright")), LIMITS, "cpu")
    image, mask = half_bright()

    async def work() -> tuple[list[Segmented], Segmented]:
        before: list[Coroutine[Any, Any, Segmented]] = [segmenter.segment(image) for _ in range(6)]
        tasks = [asyncio.ensure_future(one) for one in before]
        await asyncio.sleep(0)  # they are queued
        segmenter.use(segmenter.prepared(Predictor.load(network, "cpu")))
        return list(await asyncio.gather(*tasks)), await segmenter.segment(image)

    before, after = asyncio.run(work())
    assert {answer.model.name for answer in before} == {"brightness"}
    assert all(agree(answer.mask, mask) for answer in before)
    assert after.model.name == "lively"


def test_the_confidence_is_the_softmax_of_the_answer(network: str) -> None:
    """uint8 of the largest class probability at the photograph's size."""
    predictor = Predictor.load(network, "cpu")
    image = town.draw(5, 57, 83)[0]
    probabilities = upscale(predictor.scores([image]), (57, 83))[0].softmax(dim=0)
    expected: Mask = (probabilities.amax(dim=0) * 255).round().numpy()
    segmenter = Segmenter.load(network, LIMITS, "cpu")
    answer = answers(segmenter, [image], 1, Ask(confidence=True))[0]
    assert answer.confidence is not None
    assert np.abs(answer.confidence.astype(float) - expected).max() <= 1
    assert answers(segmenter, [image], 1)[0].confidence is None


def test_warm_shapes_that_do_not_fit_the_network_are_told(network: str) -> None:
    """A server that cannot answer the shapes it is meant for does not start."""
    with pytest.raises((DataError, BundleError), match="at least"):
        Segmenter.load(network, LIMITS, "cpu", rules=Rules(warm=((4, 4),)))
