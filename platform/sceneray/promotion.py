"""What a bundle must pass before it becomes the champion of a model, and the way there.

Gates, in this order: `bundle` (every digest is right and the network loads), `golden` (it answers its golden image
here as it did for its exporter), `miou` (not below the champion's by more than a margin), `classes` (those of the
champion, in its order). The first model of a name has no champion to be compared with. Examining writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sceneray import bundle as bundles
from sceneray import repository
from sceneray.bundle import Bundle
from sceneray.checkpoint import classes_from_json
from sceneray.data.store import ClassInfo, Store
from sceneray.errors import BundleError, ConfigError
from sceneray.evaluation import evaluate_indices
from sceneray.metrics import scores
from sceneray.predictor import Predictor
from sceneray.repository import Model
from sceneray.storage import Committed

# Other processors and libraries round otherwise, which moves a pixel where two classes are as good as equal.
GOLDEN_AGREEMENT = 0.999
MARGIN = 0.005
_ROUNDING = 1e-9  # 0.5 - 0.005 is not above 0.495 by a bit of binary arithmetic
_DEFAULT_SPLIT = "val"  # what bundles measured that do not say so

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a candidate is examined."""

    store: str | None = None  # where both are scored whose records cannot be compared
    split: str = _DEFAULT_SPLIT
    margin: float = MARGIN  # mIoU that a candidate may lack, in 0..1
    device: str | None = None  # as torch names it; None: CUDA where there is one
    say: Say = lambda _: None  # told how far a long scoring is


@dataclass(frozen=True)
class Gate:
    """One gate, and what was found at it."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Candidate:
    """A bundle that wants to be the champion of `seen`, the model as it was when the examination began."""

    bundle: Bundle
    source: Committed
    repo: str
    name: str
    version: str
    seen: Model


@dataclass(frozen=True)
class Champion:
    """What a candidate is compared with."""

    url: str
    about: dict[str, Any]  # its bundle.json
    classes: tuple[ClassInfo, ...]


@dataclass(frozen=True)
class Record:
    """An mIoU, and the digest of the store and the split it was measured on."""

    miou: float
    place: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.place[1]} of {self.place[0][:12]}"


def open_candidate(url: str, repo: str, name: str | None = None, version: str | None = None) -> Candidate:
    """The gate `bundle`: read, check and build the bundle at `url`; name and version are its own where none is given.

    Raises BundleError where it is not whole, ConfigError for a name or version that no repository takes, ConflictError
    where the version is another bundle's.
    """
    source = repository.resolve(url)
    loaded = bundles.load(source.url)
    if loaded.digest != source.digest:
        raise BundleError(f"the bundle at {source.url} was changed while it was read. Promote it again.")
    name, version = name or loaded.name, version or loaded.version
    repository.check_names(name, version)
    seen = repository.read(repo, name)
    repository.check_free(seen, version, source.digest)
    return Candidate(loaded, source, repo, name, version, seen)


def is_champion(candidate: Candidate) -> bool:
    """True where this version of this content is the champion already."""
    return candidate.seen.champion == repository.Named(candidate.version, candidate.source.digest)


def examine(candidate: Candidate, settings: Settings, report: Callable[[Gate], None] = lambda _: None) -> list[Gate]:
    """The gates after `bundle`, each told to `report` as it is done; those against a champion only where there is one.

    Raises ConfigError and DataError for settings that cannot be followed, such as a store that is not there.
    """
    if not 0 <= settings.margin <= 1:
        raise ConfigError(f"the margin is in mIoU, 0 to 1, got {settings.margin}.")
    predictor = Predictor(candidate.bundle, settings.device)
    done = [_told(report, "golden", *golden(predictor, candidate.bundle, _device(candidate.bundle)))]
    if candidate.seen.champion is None:
        return done
    for name, check in AGAINST_CHAMPION.items():
        try:
            answer = check(candidate.bundle, _champion(candidate.seen), settings)
        except BundleError as error:
            answer = False, f"cannot be compared with the champion: {error}"
        done.append(_told(report, name, *answer))
    return done


def refused(gates: Sequence[Gate], force: bool) -> list[Gate]:
    """The gates that were not passed. Raises BundleError, naming each, unless `force` says to go on."""
    failed = [gate for gate in gates if not gate.passed]
    if failed and not force:
        what = "; ".join(f"{gate.name}: {gate.found.rstrip('.')}" for gate in failed)
        raise BundleError(
            f"refused, nothing was moved. {what}. --force promotes it all the same, and writes that down."
        )
    return failed


def publish(candidate: Candidate, skipped: Sequence[Gate] = ()) -> Model:
    """Copy the candidate into its repository and make it the champion; `skipped` goes into the model's history.

    Raises ConflictError where somebody else moved the champion since the examination began.
    """
    added = repository.add(candidate.repo, candidate.name, candidate.version, candidate.source)
    notes = [{"gate": gate.name, "found": gate.found} for gate in skipped]
    return repository.set_champion(candidate.seen, added, notes)


def golden(predictor: Predictor, bundle: Bundle, device: str) -> tuple[bool, str]:
    """Whether the golden image is answered as on the exporter's machine; on one like it, pixel for pixel."""
    mask = predictor.predict([bundle.golden])[0]
    if mask.shape != bundle.golden_mask.shape:
        return False, f"the golden mask is {bundle.golden_mask.shape}, the image {mask.shape} (height, width)"
    equal = int((mask == bundle.golden_mask).sum())
    here = bundle.about.get("versions") == bundles.versions() and bundle.about.get("platform") == bundles.machine()
    found = f"{equal} of {mask.size} pixels as the exporter's"
    if here and device == "cpu":
        return equal == mask.size, f"{found}; on a machine and versions like its all must be"
    return equal >= GOLDEN_AGREEMENT * mask.size, f"{found}; on another machine {GOLDEN_AGREEMENT:.1%} must be"


def miou(bundle: Bundle, champion: Champion, settings: Settings) -> tuple[bool, str]:
    """Whether the mIoU is not below the champion's by more than the margin: as recorded where both were measured on
    one split of one store (which is the named one, where one is named), else scored here, both alike."""
    new, old = _record(bundle.about), _record(champion.about)
    if new and old and new.place == old.place and settings.store is None:
        return _compare(new.miou, old.miou, settings.margin, f"both recorded on {new}")
    if settings.store is None:
        return False, (
            f"mIoU is not recorded on one split of one store (its: {new or 'none'}, the champion's: {old or 'none'}); "
            "give --store STORE, and both are scored on it"
        )
    store = Store.open(settings.store)
    named = (store.digest, settings.split)
    if new and old and new.place == old.place == named:
        return _compare(new.miou, old.miou, settings.margin, f"both recorded on {new}")
    ours, theirs = bundle, bundles.load(champion.url)
    for one in (ours, theirs):
        differing = _difference(one.classes, store.classes)
        if differing:
            return False, f"{one.name} {one.version} cannot be scored on {store.url}: {differing}"
    found = [_score(one, store, settings) for one in (ours, theirs)]
    return _compare(found[0], found[1], settings.margin, f"both scored here on {named[1]} of {named[0][:12]}")


def classes(bundle: Bundle, champion: Champion, _: Settings) -> tuple[bool, str]:
    """Whether names and order of the classes are the champion's: a caller takes class ids from it."""
    differing = _difference(bundle.classes, champion.classes)
    return not differing, differing or f"the champion's {len(bundle.classes)}, in its order"


AGAINST_CHAMPION: dict[str, Callable[[Bundle, Champion, Settings], tuple[bool, str]]] = {
    "miou": miou,
    "classes": classes,
}


def _told(report: Callable[[Gate], None], name: str, passed: bool, found: str) -> Gate:
    gate = Gate(name, passed, found)
    report(gate)
    return gate


def _champion(seen: Model) -> Champion:
    assert seen.champion is not None
    committed = repository.standing(seen, seen.champion.version, seen.champion.digest)
    about = repository.about_of(committed)
    try:
        return Champion(committed.url, about, classes_from_json(about["classes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"bundle.json of {committed.url} lists no classes ({error!r}).") from error


def _record(about: Mapping[str, Any]) -> Record | None:
    """What a bundle.json records; None where mIoU or store is missing."""
    value = repository.recorded_miou(about)
    if value is None or not about["metrics"].get("store_digest"):
        return None
    return Record(value, (str(about["metrics"]["store_digest"]), str(about["metrics"].get("split", _DEFAULT_SPLIT))))


def _score(bundle: Bundle, store: Store, settings: Settings) -> float:
    """mIoU of a bundle on the named split, every image once at its own size."""
    Predictor(bundle, settings.device)  # puts the network on the device
    data = store.split(settings.split)
    settings.say(f"scoring {bundle.name} {bundle.version} on {len(data)} images of {settings.split} ...")
    every = range(len(data))
    device = _device(bundle)
    matrix = evaluate_indices(bundle.model, data, every, len(bundle.classes), store.ignore_index, device)
    return scores(matrix).miou


def _device(bundle: Bundle) -> str:
    return str(next(bundle.model.parameters()).device)


def _compare(new: float, old: float, margin: float, how: str) -> tuple[bool, str]:
    found = f"mIoU {new:.4f} against the champion's {old:.4f}, {margin:g} may be missing; {how}"
    return old - new <= margin + _ROUNDING, found


def _difference(ours: Sequence[ClassInfo], theirs: Sequence[ClassInfo]) -> str:
    """Where two lists of classes differ in names or order; empty where they do not."""
    a, b = [c.name for c in ours], [c.name for c in theirs]
    if a == b:
        return ""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    names = " against ".join(repr(names[at]) if at < len(names) else "none" for names in (a, b))
    return f"{len(a)} classes against {len(b)}, class {at} is {names}"
