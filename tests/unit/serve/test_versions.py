"""A replica that follows a champion: it changes under load, and a bad candidate changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from sceneray import bundle, repository, storage
from sceneray.errors import BundleError
from serve.batching import Limits
from serve.schemas import Segmented
from serve.versions import Versions
from tests.bundles import CLASSES, SETTINGS, agree, brightness_model, half_bright, write_bundle

LIMITS = Limits(max_items=4, max_cost=2**22, max_queued_cost=2**24, max_wait_s=0.01)
IMAGE, MASK = half_bright()


def promoted(repo: str, folder: Path, version: str, url: str | None = None) -> str:
    """A new champion of that version, promoted without gates; returns the URL of its bundle in the repository."""
    url = url or write_bundle(str(folder / f"bundle-{version}"), version)
    added = repository.add(repo, "brightness", version, bundle.find(url))
    repository.set_champion(repository.read(repo, "brightness"), added)
    return added.url


def wrong_bundle(folder: Path) -> str:
    """A bundle that is whole by its digests and answers its golden image with the classes exchanged."""
    url = str(folder / "wrong")
    model = brightness_model()
    about = {"name": "brightness", "version": "wrong", "metrics": {}}
    bundle.write(url, model, SETTINGS, CLASSES, 255, about)
    committed = bundle.find(url)
    files = {name: committed.read(name) for name in committed.manifest["files"]}
    other = bundle.golden_image()[::-1]
    files[bundle.GOLDEN] = bundle._png(np.ascontiguousarray(other))
    storage.commit(str(folder / "exchanged"), files, {"format": bundle.FORMAT, "version": bundle.VERSION})
    return str(folder / "exchanged")


async def answer(versions: Versions) -> str:
    """The version that answers now; its mask is checked."""
    found = await versions.segmenter.segment(IMAGE)
    assert agree(found.mask, MASK)
    return found.model.version


def test_a_replica_follows_the_champion_under_load(tmp_path: Path) -> None:
    """After promote and after rollback the named version answers, and none of the requests meanwhile fails."""
    repo = str(tmp_path / "repo")
    promoted(repo, tmp_path, "1")

    async def work() -> list[Segmented]:
        versions = Versions.start(f"{repo}/brightness@champion", LIMITS, "cpu", 1)
        answers: list[Segmented] = []
        done = asyncio.Event()

        async def load() -> None:
            while not done.is_set():
                answers.append(await versions.segmenter.segment(IMAGE))

        callers = [asyncio.create_task(load()) for _ in range(4)]
        await versions.look()
        assert await answer(versions) == "1"
        await asyncio.to_thread(promoted, repo, tmp_path, "2")
        await versions.look()
        assert await answer(versions) == "2"
        await asyncio.to_thread(repository.rollback, repo, "brightness")
        await versions.look()
        assert await answer(versions) == "1"
        done.set()
        await asyncio.gather(*callers)
        assert (await versions.describe())["candidate"] is None
        return answers

    answers = asyncio.run(work())
    assert all(agree(found.mask, MASK) for found in answers)
    assert {found.model.version for found in answers} == {"1", "2"}


def test_a_candidate_that_answers_wrongly_is_refused_and_told(tmp_path: Path) -> None:
    """The old model goes on, `describe` names the candidate and the reason, and it is not tried again and again."""
    repo = str(tmp_path / "repo")
    promoted(repo, tmp_path, "1")

    async def work() -> None:
        versions = Versions.start(f"{repo}/brightness@champion", LIMITS, "cpu", 1)
        url = promoted(repo, tmp_path, "wrong", wrong_bundle(tmp_path))
        await versions.look()
        assert await answer(versions) == "1"
        candidate = (await versions.describe())["candidate"]
        assert (candidate["state"], candidate["bundle"]) == ("refused", url)
        assert "golden image" in candidate["reason"]
        await versions.look()
        assert (await versions.describe())["candidate"] is candidate, "not tried a second time"
        promoted(repo, tmp_path, "3")
        await versions.look()
        assert await answer(versions) == "3"

    asyncio.run(work())


@pytest.mark.parametrize("damage", ["weights", "document"])
def test_a_damaged_candidate_is_refused(tmp_path: Path, damage: str) -> None:
    """A bundle whose bytes changed after its promotion, or that is gone, leaves the old model in place."""
    repo = str(tmp_path / "repo")
    promoted(repo, tmp_path, "1")

    async def work() -> None:
        versions = Versions.start(f"{repo}/brightness@champion", LIMITS, "cpu", 1)
        url = promoted(repo, tmp_path, "2")
        name = bundle.WEIGHTS if damage == "weights" else storage.MANIFEST
        storage.write_bytes(storage.join(url, name), b"{}")
        await versions.look()
        assert await answer(versions) == "1"

    asyncio.run(work())


def test_a_replica_that_starts_with_a_broken_champion_answers_with_the_one_before(tmp_path: Path) -> None:
    """The endpoint stays up, and `describe` says which champion was refused; without one before it does not start."""
    repo = str(tmp_path / "repo")
    broken = promoted(repo, tmp_path, "1")
    storage.write_bytes(storage.join(broken, bundle.WEIGHTS), b"no weights")
    with pytest.raises(BundleError):
        Versions.start(f"{repo}/brightness@champion", LIMITS, "cpu", 1)
    second = str(tmp_path / "second")
    promoted(second, tmp_path, "good")
    broken = promoted(second, tmp_path, "bad")
    storage.write_bytes(storage.join(broken, bundle.WEIGHTS), b"no weights")

    async def work() -> None:
        versions = Versions.start(f"{second}/brightness@champion", LIMITS, "cpu", 1)
        assert await answer(versions) == "good"
        assert (await versions.describe())["candidate"]["state"] == "refused"

    asyncio.run(work())


def test_a_store_that_is_away_changes_nothing(tmp_path: Path) -> None:
    """While the repository cannot be read the model stays, and following goes on afterwards."""
    repo = str(tmp_path / "repo")
    promoted(repo, tmp_path, "1")

    async def work() -> None:
        versions = Versions.start(f"{repo}/brightness@champion", LIMITS, "cpu", 1)
        promoted(repo, tmp_path, "2")
        (tmp_path / "repo").rename(tmp_path / "away")
        await versions.look()
        assert await answer(versions) == "1"
        (tmp_path / "away").rename(tmp_path / "repo")
        await versions.look()
        assert await answer(versions) == "2"
        await versions.change_to(str(tmp_path / "nowhere"))
        assert await answer(versions) == "2"
        await versions.change_to(f"{repo}/brightness@1")
        assert await answer(versions) == "1"

    asyncio.run(work())
