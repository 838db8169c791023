"""The model repository: which versions of a model there are, which one is served, which one was before. No torch here.

    REPO/MODEL/VERSION/     a bundle, copied in once and never changed
    REPO/MODEL/model.json   champion, previous, the digest that each version name belongs to, the last moves

Both aliases stand in one document: a promote or a rollback is one compare-and-swap, so the two cannot disagree, and a
writer that dies has moved both or none. A version is entered before its files are written, so no two writers ever
write different bundles into one folder. `REPO/MODEL@champion`, `@previous` and `@VERSION` name a bundle wherever a
bundle's URL is asked for (`resolve`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sceneray import storage
from sceneray.errors import BundleError, ConfigError, ConflictError, StorageError, UnreachableError, unknown_name
from sceneray.storage import Committed

FORMAT = "sceneray-model"
VERSION = 1
DOCUMENT = "model.json"
ABOUT = "bundle.json"  # of a bundle: sceneray.bundle says so too, and brings torch with it
ALIASES = ("champion", "previous")
HISTORY = 50  # moves that the document remembers
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Named:
    """What an alias names."""

    version: str
    digest: str  # of the bundle


@dataclass(frozen=True)
class Model:
    """One model of a repository, as its document tells. `moves` counts all moves of the champion there ever were."""

    url: str  # REPO/MODEL
    champion: Named | None = None
    previous: Named | None = None
    versions: Mapping[str, str] = field(default_factory=dict)  # the digest that a version's name belongs to
    moves: int = 0
    history: tuple[dict[str, Any], ...] = ()  # oldest first, at most HISTORY


def check_names(name: str, version: str) -> None:
    """Raise ConfigError unless both can be a folder's name and stand in MODEL@VERSION."""
    reserved = (*ALIASES, DOCUMENT)
    for what, value in (("name", name), ("version", version)):
        if not _NAME.fullmatch(value) or value in reserved:
            raise ConfigError(
                f"a model's {what} in a repository has 1 to 64 letters, digits, dots, dashes, underscores or pluses, "
                f"begins with a letter or digit, and is none of {', '.join(reserved)}; got {value!r}. Give --{what}."
            )


def read(repo: str, name: str) -> Model:
    """The model `name` of `repo`; one without champion and versions where there is none yet."""
    return _read(_url(repo, name))[0]


def names(repo: str) -> list[str]:
    """Sorted names of the models in `repo`."""
    return [name for name in storage.list_names(repo) if storage.is_file(storage.join(repo, name, DOCUMENT))]


def versions(model: Model) -> list[str]:
    """Sorted names of a model's versions: those that are whole, and those whose copying was never finished."""
    return sorted({name for name in storage.list_names(model.url) if name != DOCUMENT} | set(model.versions))


def resolve(url: str) -> Committed:
    """The bundle that `url` names: REPO/MODEL@champion, REPO/MODEL@previous, REPO/MODEL@VERSION, or a bundle's URL.

    A last segment with an @ is always such a reference. What is returned does not move when the alias does. Raises
    BundleError where nothing of that name is there, or where a version is not the bundle that was promoted.
    """
    url = storage.absolute(url)
    last = storage.basename(url)
    if "@" not in last:
        return _open(url)
    repo, (name, _, wanted) = url[: -len(last) - 1], last.rpartition("@")
    if repo.endswith(":/") or not _NAME.fullmatch(name) or not _NAME.fullmatch(wanted):
        raise BundleError(f"{url} names no bundle. Give REPO/MODEL@champion, @previous or @VERSION.")
    model = read(repo, name)
    if not model.moves and not model.versions:
        raise BundleError(f"{repo}: {unknown_name('model', name, names(repo))}")
    if wanted not in ALIASES:
        return standing(model, wanted)
    named = {"champion": model.champion, "previous": model.previous}[wanted]
    if named is None:
        raise BundleError(f"{model.url} has no {wanted} yet. `sceneray promote BUNDLE --repo {repo}` makes a champion.")
    return standing(model, named.version, named.digest)


def standing(model: Model, version: str, digest: str | None = None) -> Committed:
    """The bundle of one version, which must be the one with this digest; None: the one that the document tells.

    Raises BundleError where there is none, or where it is another one.
    """
    committed = _open(storage.join(model.url, version))
    wanted = digest or model.versions.get(version, committed.digest)
    if wanted != committed.digest:
        raise BundleError(
            f"{committed.url} is not the bundle that was promoted as version {version}: its digest is "
            f"{committed.digest[:12]}, not {wanted[:12]}. Somebody wrote over it; promote a whole bundle."
        )
    return committed


def check_free(model: Model, version: str, digest: str) -> None:
    """Raise ConflictError where `version` is the name of another bundle than the one with this digest."""
    committed = storage.open_committed(storage.join(model.url, version))
    taken = committed.digest if committed is not None else model.versions.get(version)
    if taken not in (None, digest):
        state = "is there already with" if committed is not None else "was begun and never finished with"
        raise ConflictError(
            f"version {version} of {model.url} {state} another content ({taken[:12]}, not {digest[:12]}): a version is "
            "never changed. Give another --version."
        )


def add(repo: str, name: str, version: str, source: Committed) -> Committed:
    """Copy the bundle `source` to REPO/MODEL/VERSION, or find it there; every file of it is read back.

    Raises ConflictError where the version is another bundle's, StorageError where a file is damaged.
    """
    check_names(name, version)
    _check_manifest(source)
    url = _url(repo, name)

    def enter(model: Model) -> Model:
        check_free(model, version, source.digest)
        return dataclasses.replace(model, versions={**model.versions, version: source.digest})

    _change(url, enter)
    target = storage.join(url, version)
    committed = storage.open_committed(target)
    if committed is not None:
        committed.verify()
        return committed
    about = {key: value for key, value in source.manifest.items() if key != "files"}
    return storage.commit(target, {file: source.read(file) for file in source.manifest["files"]}, about, verify=True)


def set_champion(seen: Model, added: Committed, skipped: Sequence[Mapping[str, str]] = ()) -> Model:
    """Make the version `added` (by `add`) the champion; the champion until now becomes `previous`. One swap.

    `seen` is the model as it was when the decision was made; `skipped` are refused gates that --force passed. Nothing
    moves where it is the champion already. Raises ConflictError where somebody else moved the champion since `seen`.
    """
    named = Named(storage.basename(added.url), added.digest)

    def move(now: Model) -> Model:
        if now.champion == named:
            return now
        _check_unmoved(now, seen)
        return _moved(now, named, "force" if skipped else "promote", skipped)

    return _change(seen.url, move)


def rollback(repo: str, name: str) -> Model:
    """Exchange champion and previous by one swap, once every file of the previous bundle was read and is whole.

    Raises BundleError where there is no whole previous, ConflictError where somebody else moved the champion meanwhile.
    """
    seen = read(repo, name)
    previous = seen.previous
    if previous is None:
        what = "has one champion and none before it" if seen.champion else "has no champion"
        raise BundleError(f"nothing to roll back to: {seen.url} {what}. `sceneray models {repo}` shows what there is.")
    try:
        standing(seen, previous.version, previous.digest).verify()
    except UnreachableError:
        raise  # says nothing about the bundle
    except StorageError as error:
        raise BundleError(f"{error} The champion stays. Promote a whole bundle: sceneray promote BUNDLE.") from error

    def move(now: Model) -> Model:
        _check_unmoved(now, seen)
        return _moved(now, previous, "rollback")

    return _change(seen.url, move)


def about_of(committed: Committed) -> dict[str, Any]:
    """bundle.json of a bundle. Raises BundleError where it has none or a damaged one."""
    try:
        return dict(json.loads(committed.read(ABOUT)))
    except UnreachableError:
        raise
    except (StorageError, TypeError, ValueError) as error:
        raise BundleError(f"{committed.url} is no whole bundle: {error}") from error


def recorded_miou(document: Mapping[str, Any]) -> float | None:
    """The mIoU that a bundle.json records; None where it records none that is a number."""
    metrics = document.get("metrics")
    values = metrics.get("values") if isinstance(metrics, dict) else None
    miou = values.get("miou") if isinstance(values, dict) else None
    return float(miou) if isinstance(miou, int | float) and math.isfinite(miou) else None


def _url(repo: str, name: str) -> str:
    check_names(name, "1")
    return storage.join(storage.absolute(repo), name)


def _read(url: str) -> tuple[Model, str | None]:
    """The model at `url`, and the tag that its document must still have when it is swapped."""
    document_url = storage.join(url, DOCUMENT)
    tag = storage.etag(document_url)  # before the content: what is newer than its tag loses the swap
    if tag is None:
        return Model(url), None
    value = storage.read_json(document_url)
    try:
        if (value["format"], value["version"]) != (FORMAT, VERSION):
            raise StorageError(
                f"{document_url} is a {value['format']} of version {value['version']}; this sceneray reads {FORMAT} of "
                f"version {VERSION}. Check the repository's URL, or use the sceneray that wrote it."
            )
        champion, previous = (None if value[alias] is None else Named(**value[alias]) for alias in ALIASES)
        return Model(url, champion, previous, dict(value["versions"]), value["moves"], tuple(value["history"])), tag
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{document_url} is damaged ({error!r}). Restore it from a backup.") from error


def _change(url: str, change: Callable[[Model], Model]) -> Model:
    """Swap the document at `url` for what `change` makes of it, asked again where somebody wrote in between."""
    while True:
        model, tag = _read(url)
        changed = change(model)
        if changed == model:
            return model
        value = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(changed)}
        del value["url"]  # a repository may be copied
        data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
        try:
            storage.compare_and_swap(storage.join(url, DOCUMENT), tag, data)
            return changed
        except ConflictError:
            continue


def _check_unmoved(now: Model, seen: Model) -> None:
    if now.moves != seen.moves:
        to = "away" if now.champion is None else f"to version {now.champion.version}"
        raise ConflictError(
            f"somebody else moved the champion of {now.url} meanwhile, {to}. Nothing was moved here. Look at "
            "`sceneray models REPO`, and do it again."
        )


def _moved(model: Model, champion: Named, by: str, skipped: Sequence[Mapping[str, str]] = ()) -> Model:
    """`model` with another champion, and the move written down."""
    entry = {
        "by": by,
        "moved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "champion": dataclasses.asdict(champion),
        "earlier": None if model.champion is None else dataclasses.asdict(model.champion),
        "skipped": [dict(gate) for gate in skipped],
    }
    history = (*model.history, entry)[-HISTORY:]
    return dataclasses.replace(
        model, champion=champion, previous=model.champion, moves=model.moves + 1, history=history
    )


def _open(url: str) -> Committed:
    how = f"Write one: sceneray export CHECKPOINT {url}"
    try:
        committed = storage.open_committed(url)
    except UnreachableError:
        raise
    except StorageError as error:
        raise BundleError(f"{error} {how}") from error
    if committed is None:
        raise BundleError(f"no bundle at {url}: nothing was ever finished there. {how}")
    return committed


def _check_manifest(source: Committed) -> None:
    """Raise BundleError where a copy of `source` would not be the same folder, or would leave its own."""
    for name, entry in source.manifest["files"].items():
        inside = name != storage.MANIFEST and all(part not in ("", ".", "..") for part in re.split(r"[/\\]", name))
        if not inside or set(entry) != {"bytes", "sha256"}:
            raise BundleError(
                f"{source.url} cannot be copied: its manifest has an entry {name!r} that no export writes."
            )
