"""The gates before a champion: each refuses and says what it found, and --force passes all but the bundle's own."""

from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np
import pytest
import torch

from jobs import promote, rollback
from jobs.cli import arguments_of
from jobs.models import run as list_models
from sceneray import bundle, repository, storage
from sceneray.data.images import encode_jpeg, encode_label
from sceneray.data.store import Sample, Store, write_manifest, write_shard
from sceneray.errors import BundleError, ConfigError, DataError
from tests.bundles import BRIGHT, CLASSES, DARK, brightness_model, half_bright
from tests.repositories import MODEL, STORE, content, darkened, export, written
from tests.repositories import one_thread as one_thread


@pytest.fixture
def root() -> str:
    """An empty folder in memory."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def repo(root: str) -> str:
    """A repository whose champion is version 1, with mIoU 0.5."""
    url = storage.join(root, "repo")
    source = repository.resolve(export(root, "1"))
    repository.set_champion(repository.read(url, MODEL), repository.add(url, MODEL, "1", source))
    return url


def call(*arguments: str) -> dict[str, Any]:
    """Run `sceneray promote` in this process."""
    return promote.run(arguments_of("promote", arguments))


def champion(repo: str) -> str | None:
    """The champion's version."""
    named = repository.read(repo, MODEL).champion
    return named.version if named else None


def refuse(repo: str, url: str, message: str, *options: str) -> None:
    """`promote` says `message`, and not a byte of the repository is another one."""
    before = content(repo)
    with pytest.raises(BundleError, match=message):
        call(url, "--repo", repo, *options)
    assert content(repo) == before


def force(repo: str, url: str, gates: list[str], *options: str) -> None:
    """With --force it is promoted, and the history says past which gates."""
    result = call(url, "--repo", repo, "--force", *options)
    assert result["moved"]
    assert result["skipped"] == gates
    move = repository.read(repo, MODEL).history[-1]
    assert move["by"] == "force"
    assert [gate["gate"] for gate in move["skipped"]] == gates
    assert all(gate["found"] for gate in move["skipped"])


@pytest.mark.parametrize("file", [bundle.WEIGHTS, bundle.ABOUT, bundle.GOLDEN, bundle.GOLDEN_MASK])
def test_a_damaged_bundle_is_never_promoted(
    root: str, repo: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One altered byte in any file is refused by name, and --force does not help."""
    url = export(root, "2")
    data = bytearray(storage.read_bytes(storage.join(url, file)))
    data[len(data) // 2] ^= 1
    storage.write_bytes(storage.join(url, file), bytes(data))
    for options in ([], ["--force"]):
        refuse(repo, url, file, *options)
        assert capsys.readouterr().out.startswith("bundle   refused")


def test_weights_of_another_network_are_never_promoted(root: str, repo: str) -> None:
    """A bundle whose digests are right and whose network cannot be built is refused, also with --force."""
    model = json.loads(written()[bundle.ABOUT])["model"] | {"head_width": 16}
    refuse(repo, export(root, "2", model=model), "size mismatch", "--force")


def test_the_golden_gate(root: str, repo: str) -> None:
    """On the exporter's machine each pixel counts; on another 0.1 % may differ and no more. --force passes it."""
    elsewhere = {"platform": {"machine": "elsewhere"}}
    one_off = export(root, "2", wrong=1)
    refuse(
        repo, one_off, "golden: 49151 of 49152 pixels as the exporter's; on a machine and versions like its all must"
    )
    call(export(root, "3", wrong=49, **elsewhere), "--repo", repo)
    versions = {"versions": {"torch": "1.0"}}
    call(export(root, "4", wrong=49, **versions), "--repo", repo)
    assert champion(repo) == "4"
    refuse(repo, export(root, "5", wrong=50, **elsewhere), r"49102 of 49152 pixels.*on another machine 99\.9% must be")
    force(repo, one_off, ["golden"])
    assert champion(repo) == "2"


def test_a_bundle_tells_the_machine_that_answered(root: str) -> None:
    """bundle.json has what can change a CPU's last bit; a bundle without it is examined as another machine's."""
    about = json.loads(written()[bundle.ABOUT])
    assert about["platform"] == bundle.machine()
    assert set(about["platform"]) == {"system", "machine", "processor", "cpu_capability", "threads"}
    call(export(root, "1", wrong=1, platform=None), "--repo", storage.join(root, "repo"))


def test_the_miou_gate_on_records(root: str, repo: str) -> None:
    """Below the champion's by more than the margin is refused; by the margin itself, or with a wider one, it passes."""
    below = export(root, "2", 0.4949)
    refuse(repo, below, r"miou: mIoU 0\.4949 against the champion's 0\.5000, 0\.005 may be missing; both recorded")
    refuse(repo, export(root, "3", 0.495), "0.004 may be missing", "--margin", "0.004")
    call(export(root, "3", 0.495), "--repo", repo)
    call(export(root, "4", 0.3), "--repo", repo, "--margin", "0.3")
    refuse(repo, below.replace("export-2", "export-5"), "no bundle at")
    call(export(root, "6", 0.9), "--repo", repo)
    force(repo, below, ["miou"])


@pytest.mark.parametrize(
    "change", [{"store": "cd" * 32}, {"split": "test"}, {"miou": None}, {"miou": float("nan")}, {"metrics": {}}]
)
def test_records_that_cannot_be_compared(root: str, repo: str, change: dict[str, Any]) -> None:
    """Another store or split, or no mIoU at all: without --store that is refused, and the error says what to give."""
    url = export(root, "2", **{"miou": 0.9, **change})
    refuse(repo, url, r"miou: mIoU is not recorded on one split of one store .*--store STORE")
    force(repo, url, ["miou"])


def test_a_record_without_a_split_is_of_val(root: str, repo: str) -> None:
    """Bundles of before did not say on which split they were measured: it was val."""
    metrics = {"store_digest": STORE, "values": {"miou": 0.4}}
    refuse(repo, export(root, "2", metrics=metrics), "both recorded on val of abababababab")


def bright_store(url: str) -> Store:
    """A store of two pictures, half dark and half bright, in the classes of the hand-set network."""
    image, mask = half_bright()
    samples = [Sample(f"{n}", encode_jpeg(image, 95), encode_label(mask), *mask.shape) for n in range(2)]
    return write_manifest(url, CLASSES, {"val": [write_shard(url, "val", 0, 1, samples)]}, {"layout": "by-hand"})


def test_both_are_scored_on_the_named_store(root: str, repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where records cannot be compared both networks are scored on --store, whatever their bundles claim."""
    store = bright_store(f"{root}/store")
    claims = export(root, "2", 0.99, store="cd" * 32, make=darkened)
    refuse(
        repo,
        claims,
        r"miou: mIoU 0\.[0-4]\d+ against the champion's 0\.\d+, .* both scored here on val",
        "--store",
        store.url,
    )
    err = capsys.readouterr().err
    assert "scoring brightness 2 on 2 images of val" in err
    assert "scoring brightness 1 on 2 images of val" in err
    call(export(root, "3", 0.01, store="cd" * 32), "--repo", repo, "--store", store.url)
    assert champion(repo) == "3"
    force(repo, claims, ["miou"], "--store", store.url)


def test_records_on_the_named_store_are_taken(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where both were measured on the very store that is named, nothing is scored; on another one, both are."""
    store, repo = bright_store(f"{root}/store"), f"{root}/repo"
    call(export(root, "1", 0.5, store=store.digest), "--repo", repo)
    call(export(root, "2", 0.6, store=store.digest), "--repo", repo, "--store", store.url)
    assert "scoring" not in capsys.readouterr().err
    other = write_manifest(f"{root}/store", CLASSES, {"val": [shard_of(store)]}, {"layout": "by-hand", "note": "other"})
    assert other.digest != store.digest
    call(export(root, "3", 0.1, store=store.digest), "--repo", repo, "--store", other.url)
    assert capsys.readouterr().err.count("scoring") == 2


def shard_of(store: Store) -> Any:
    """The one shard of a store, as write_shard describes it."""
    samples = [store.split("val").read(index) for index in range(2)]
    return write_shard(store.url, "val", 0, 1, samples)


def test_a_store_that_is_not_there_or_of_other_classes(root: str, repo: str) -> None:
    """A store that cannot be opened is the caller's error, forced or not; one of other classes refuses."""
    url = export(root, "2", 0.9, store="cd" * 32)
    for options in ([], ["--force"]):
        with pytest.raises(DataError, match="holds no dataset store"):
            call(url, "--repo", repo, "--store", f"{root}/nowhere", *options)
    shard = shard_of(bright_store(f"{root}/store"))
    write_manifest(f"{root}/store", CLASSES[::-1], {"val": [shard]}, {"layout": "by-hand"})
    refuse(
        repo,
        url,
        "cannot be scored on .*: 3 classes against 3, class 0 is 'dark' against 'never'",
        "--store",
        f"{root}/store",
    )


@pytest.mark.parametrize("margin", ["-0.1", "1.1", "nan"])
def test_a_margin_is_in_miou(root: str, repo: str, margin: str) -> None:
    """A margin outside 0 to 1 (percent, say) is refused."""
    with pytest.raises(ConfigError, match="0 to 1"):
        call(export(root, "2"), "--repo", repo, f"--margin={margin}")


def test_the_classes_gate(root: str, repo: str) -> None:
    """Other names, or another order, are refused, because callers know class ids; other colours are fine."""
    listed = json.loads(written()[bundle.ABOUT])["classes"]
    turned = [one | {"id": number} for number, one in enumerate(listed[::-1])]
    renamed = [listed[0] | {"name": "night"}, *listed[1:]]
    for version, classes, found in [("2", turned, "class 0 is 'never' against 'dark'"), ("3", renamed, "'night'")]:
        refuse(repo, export(root, version, classes=classes), f"classes: 3 classes against 3, .*{found}")
    force(repo, f"{root}/export-2", ["classes"])
    recoloured = [one | {"color": [1, 2, 3]} for one in turned]
    call(export(root, "4", classes=recoloured), "--repo", repo)


def test_every_refusal_is_told_at_once(root: str, repo: str) -> None:
    """All gates are run and named, so that nobody learns of them one promote at a time; --force passes all."""
    renamed = [one | {"name": one["name"] + "s"} for one in json.loads(written()[bundle.ABOUT])["classes"]]
    url = export(root, "2", 0.1, wrong=9000, classes=renamed)
    refuse(repo, url, r"golden: .*; miou: .*; classes: .*\. --force promotes it all the same")
    force(repo, url, ["golden", "miou", "classes"])


def test_a_champion_that_is_damaged_can_be_replaced(root: str, repo: str) -> None:
    """Where the champion's bundle is broken nothing can be compared with it: that is said, and --force goes on."""
    storage.write_bytes(f"{repo}/{MODEL}/1/{bundle.ABOUT}", b"{}")
    url = export(root, "2", 0.9)
    refuse(repo, url, "miou: cannot be compared with the champion: .*bundle.json.*; classes: cannot be compared")
    force(repo, url, ["miou", "classes"])
    with pytest.raises(BundleError, match="The champion stays"):
        rollback.run(arguments_of("rollback", ["--repo", repo, "--name", MODEL]))
    rows = list_models(arguments_of("models", [repo]))["models"][0]["versions"]
    assert [bool(row["problem"]) for row in rows] == [True, False]


def test_force_that_was_not_needed_is_no_force(root: str, repo: str) -> None:
    """Where every gate is passed, --force leaves no trace."""
    assert call(export(root, "2", 0.6), "--repo", repo, "--force")["skipped"] == []
    assert repository.read(repo, MODEL).history[-1]["by"] == "promote"


def test_the_scores_of_the_hand_set_networks() -> None:
    """What the tests above rely on: one network is right about half_bright away from the edge, the other one is not."""
    image, mask = half_bright()
    batch = torch.tensor(image[None]).permute(0, 3, 1, 2)
    answers = [model.predict(batch)[0].numpy() for model in (brightness_model(), darkened())]
    assert float((answers[0] == mask).mean()) > 0.9
    assert np.array_equal(np.unique(answers[1]), [DARK])
    assert BRIGHT in answers[0]
