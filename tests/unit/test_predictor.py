"""The predictor: right answers, the same ones in a batch and alone, and clear refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sceneray import bundle
from sceneray.bundle import Bundle
from sceneray.config import ModelSettings
from sceneray.data import town
from sceneray.errors import BundleError, ConfigError, DataError
from sceneray.models.pspnet import PSPNet, build_model
from sceneray.predictor import Predictor
from tests.bundles import agree, half_bright, write_bundle


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle whose answers are known."""
    return bundle.load(write_bundle(str(tmp_path_factory.mktemp("bundle"))))


@pytest.fixture(scope="module")
def trained_looking(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of a network with random weights: every layer takes part, and its masks have many regions."""
    torch.manual_seed(1)
    settings = ModelSettings(backbone="mobilenet_v2", head_width=32, aux_width=8)
    model = build_model(settings, len(town.CLASSES), load_weights=False)
    url = str(tmp_path_factory.mktemp("random"))
    bundle.write(url, model, settings, town.CLASSES, 255, {"name": "random", "version": "1"})
    return bundle.load(url)


def test_the_answer_is_the_networks(bright: Bundle) -> None:
    """A picture dark on the left and bright on the right gives that mask, at the picture's size."""
    image, mask = half_bright(50, 70)
    (answer,) = Predictor(bright, "cpu").predict([image])
    assert answer.dtype == np.uint8
    assert agree(answer, mask)


def test_mixed_shapes_keep_their_order(bright: Bundle) -> None:
    """Images of several shapes come back in the order given, each with its own mask."""
    shapes = [(48, 64), (40, 80), (48, 64), (64, 48), (40, 80)]
    pictures = [half_bright(*shape) for shape in shapes]
    answers = Predictor(bright, "cpu").predict([image for image, _ in pictures])
    assert [answer.shape for answer in answers] == shapes
    assert all(agree(answer, mask) for answer, (_, mask) in zip(answers, pictures, strict=True))


def test_a_batch_answers_as_its_images_alone(trained_looking: Bundle) -> None:
    """Together or one by one, every pixel has the same class: nothing in a batch leaks into its neighbour."""
    predictor = Predictor(trained_looking, "cpu")
    images = [town.draw(seed, 64, 96)[0] for seed in range(4)]
    together = predictor.predict(images)
    alone = [predictor.predict([image])[0] for image in images]
    assert len({mask.tobytes() for mask in alone}) == 4
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_the_pixel_budget_splits_a_batch(bright: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward pass has more pixels than the budget, but for a single image above it; the answers stay."""
    sizes = []
    real = PSPNet.scores

    def recording(self: PSPNet, images: torch.Tensor) -> torch.Tensor:
        sizes.append((images.shape[0], images.shape[2] * images.shape[3]))
        return real(self, images)

    monkeypatch.setattr(PSPNet, "scores", recording)
    small, large = half_bright(32, 32), half_bright(64, 64)
    answers = Predictor(bright, "cpu", pixel_budget=3000).predict([small[0]] * 5 + [large[0]])
    assert sizes == [(2, 1024), (2, 1024), (1, 1024), (1, 4096)]
    assert all(agree(answer, small[1]) for answer in answers[:5])
    assert agree(answers[5], large[1])


def test_threads_share_one_predictor(bright: Bundle) -> None:
    """Called from four threads at once, each call gets the answers to its own images."""
    predictor = Predictor(bright, "cpu")
    pictures = [half_bright(32 + 8 * n, 40) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda picture: predictor.predict([picture[0]])[0], pictures * 3))
    assert all(agree(answer, mask) for answer, (_, mask) in zip(answers, pictures * 3, strict=True))


def test_no_images_no_masks(bright: Bundle) -> None:
    """An empty list is answered with an empty list."""
    assert Predictor(bright, "cpu").predict([]) == []


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((32, 32, 3), np.float32), "float32"),
        (np.zeros((32, 32), np.uint8), r"\[32, 32\]"),
        (np.zeros((32, 32, 4), np.uint8), r"\[32, 32, 4\]"),
        ("photo.jpg", "got str"),
        (np.zeros((7, 32, 3), np.uint8), "at least 8 pixels.*7 × 32"),
    ],
)
def test_what_is_no_image_is_refused(bright: Bundle, image: Any, said: str) -> None:
    """Another type, shape or a size below the output stride: an error that says the rule and what came."""
    with pytest.raises(DataError, match=said):
        Predictor(bright, "cpu").predict([image])


def test_an_unknown_device_is_refused(bright: Bundle) -> None:
    """A device that torch does not know is a setting to mend, not a crash."""
    with pytest.raises(ConfigError, match="unknown device 'gpu7'"):
        Predictor(bright, "gpu7")


def test_the_self_check_knows_the_golden_answer(bright: Bundle, tmp_path: Path) -> None:
    """A bundle agrees with its golden mask; with weights that answer otherwise the check refuses."""
    assert Predictor(bright, "cpu").self_check() == 1
    spoilt = bundle.load(write_bundle(str(tmp_path)))
    with torch.no_grad():
        spoilt.model.head.classifier.bias += torch.tensor([0.0, 0.0, 100.0])
    with pytest.raises(BundleError, match="golden image"):
        Predictor(spoilt, "cpu").self_check()
