"""What tests of the model repository share: small folders in a bundle's format, real bundles, a look at the aliases."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from sceneray import bundle, repository, storage
from sceneray.data.images import decode_label
from sceneray.errors import BundleError
from sceneray.masks import indexed_png
from sceneray.models.pspnet import PSPNet
from sceneray.repository import Model
from sceneray.storage import Committed
from tests.bundles import CLASSES, SETTINGS, brightness_model

NAME = "street"  # a model of small folders
MODEL = "brightness"  # a model of bundles that can be run
STORE = "ab" * 32  # a digest that a bundle records


def small(root: str, version: str, content: str | None = None) -> Committed:
    """A committed folder of a bundle's format with two small files; its content is its version's, or `content`."""
    text = content or version
    files = {"bundle.json": json.dumps({"version": version, "text": text}).encode(), "weights": text.encode() * 10}
    about = {"format": bundle.FORMAT, "version": bundle.VERSION}
    return storage.commit(storage.join(root, f"export-{version}-{text}"), files, about)


def promote(root: str, version: str, content: str | None = None) -> Model:
    """What `sceneray promote` does once the gates are passed."""
    seen = repository.read(storage.join(root, "repo"), NAME)
    return finish(root, seen, small(root, version, content), version)


def finish(root: str, seen: Model, source: Committed, version: str) -> Model:
    """Copy and move."""
    return repository.set_champion(seen, repository.add(storage.join(root, "repo"), NAME, version, source))


def aliases(root: str) -> list[str | None]:
    """The versions of champion and previous, each bundle read in full; None where the alias names nothing."""
    found: list[str | None] = []
    for alias in repository.ALIASES:
        try:
            committed = repository.resolve(storage.join(root, "repo", f"{NAME}@{alias}"))
        except BundleError:
            found.append(None)
            continue
        committed.verify()
        found.append(storage.basename(committed.url))
    return found


def check_history(model: Model, start: int = 0) -> None:
    """Each move begins where the one before it ended, and the aliases are those of the last one."""
    moves = list(model.history[start:])
    for before, after in itertools.pairwise(moves):
        assert after["earlier"] == before["champion"]
    assert model.moves == len(model.history)
    assert model.champion is not None
    assert moves[-1]["champion"] == vars(model.champion)
    assert moves[-1]["earlier"] == (vars(model.previous) if model.previous else None)


def content(url: str) -> dict[str, bytes]:
    """Every file below `url`, but for the locks of a local file system."""
    return {name: storage.read_bytes(storage.join(url, name)) for name, _ in storage.walk_files(url)}


def darkened() -> PSPNet:
    """A network that finds nothing bright."""
    model = brightness_model()
    with torch.no_grad():
        model.head.classifier.bias.copy_(torch.tensor([0.0, -100.0, -10.0]))
    return model


@cache
def written(make: Callable[[], PSPNet] = brightness_model) -> dict[str, bytes]:
    """The files of a bundle: a network run once, and used by many tests."""
    url = f"memory://{uuid.uuid4().hex}"
    committed = bundle.write(url, make(), SETTINGS, CLASSES, 255, {"name": MODEL, "version": "0"})
    return {name: committed.read(name) for name in committed.manifest["files"]}


def export(root: str, version: str, miou: float | None = 0.5, **changes: Any) -> str:
    """A bundle below `root` with this mIoU; `changes` replace keys of bundle.json.

    `wrong` pixels of the golden mask are altered, `make` is the network.
    """
    make, wrong = changes.pop("make", brightness_model), changes.pop("wrong", 0)
    metrics = {"store_digest": changes.pop("store", STORE), "split": changes.pop("split", "val")}
    files = dict(written(make))
    about = json.loads(files[bundle.ABOUT]) | {"version": version, "metrics": {**metrics, "values": {"miou": miou}}}
    files[bundle.ABOUT] = json.dumps(about | changes).encode()
    if wrong:
        mask = decode_label(files[bundle.GOLDEN_MASK]).copy()
        mask.reshape(-1)[:wrong] = 2  # the hand-set network never answers 2
        files[bundle.GOLDEN_MASK] = indexed_png(mask, CLASSES)
    url = storage.join(root, f"export-{version}")
    return storage.commit(url, files, {"format": bundle.FORMAT, "version": bundle.VERSION}).url


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: so small a network is no faster on more threads, and waits where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
