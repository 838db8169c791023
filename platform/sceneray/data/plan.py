"""Preparing a store in parts that can be repeated: a plan, the shards it names, and the manifest that commits them.

While a store is being prepared its folder holds `plan.json` and, for each finished shard, a record in `.shards/`. The
same plan again keeps finished shards; another plan is refused with what changed. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sceneray import storage
from sceneray.data.layouts import LAYOUTS
from sceneray.data.listing import Item, LayoutOptions, Listing, Reader
from sceneray.data.store import PLAN, ClassInfo, ShardInfo, Store, shard_name, write_manifest, write_shard
from sceneray.errors import DataError, unknown_name

RECORDS = ".shards"
PARALLEL_SHARDS = 8  # a small dataset is still cut into so many, so that several workers prepare it
LEAST_ROWS = 32


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write; plain values, sent to a worker."""

    store: str
    split: str
    index: int
    total: int
    read: Reader
    classes: tuple[ClassInfo, ...]
    ignore_index: int
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Plan:
    """What a store will be made from, and how it is cut into shards."""

    store: str
    layout: str
    document: dict[str, Any]  # plan.json: everything that decides the store's content
    shards: tuple[ShardPlan, ...]
    classes: tuple[ClassInfo, ...]

    @property
    def digest(self) -> str:
        """sha256 of the plan."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()


def make_plan(layout: str, source: str | None, store: str, options: LayoutOptions, shard_mb: float) -> Plan:
    """List the source and cut it into shards. Raises DataError where the source breaks a rule of its layout."""
    if layout not in LAYOUTS:
        raise DataError(unknown_name("layout", layout, LAYOUTS))
    if shard_mb <= 0:
        raise DataError(f"--shard-mb must be above 0, got {shard_mb}.")
    listing = LAYOUTS[layout](source, options)
    for split, items in listing.splits.items():
        if not items:
            raise DataError(
                f"the split '{split}' of {source} is empty: put photographs and labels in it, or remove it."
            )
    store = storage.absolute(store)
    document = {
        "layout": layout,
        "source": None if source is None else storage.absolute(source),
        "settings": {**listing.settings, "shard_mb": shard_mb},
        "classes": [asdict(info) for info in listing.classes],
        "files": {split: {i.name: [i.image, i.bytes] for i in items} for split, items in listing.splits.items()},
    }
    document = json.loads(json.dumps(document))  # as it will be read back: tuples are lists
    shards = [shard for split in sorted(listing.splits) for shard in _cut(store, listing, split, shard_mb)]
    return Plan(store, layout, document, tuple(shards), listing.classes)


def begin(plan: Plan, overwrite: bool = False) -> list[ShardPlan]:
    """Make the store's folder ready for `plan` and return the shards that are still to be written.

    Raises DataError where the folder was begun with another plan, with what changed.
    """
    url = storage.join(plan.store, PLAN)
    if overwrite:
        clear(plan.store)
    try:
        before = storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError):
        before = None
    if before is None:
        if storage.exists(storage.join(plan.store, storage.MANIFEST)):
            raise DataError(f"{plan.store} holds something else already: give another STORE, or --overwrite.")
        storage.write_json(url, plan.document)
    elif before != plan.document:
        raise DataError(
            f"{plan.store} was prepared from something else: {'; '.join(changes(before, plan.document))}. Give another "
            "STORE, or --overwrite to replace it."
        )
    return [shard for shard in plan.shards if finished(shard) is None]


def finished(shard: ShardPlan) -> ShardInfo | None:
    """The record of a shard that was written whole; None where it is still to be written."""
    name = shard_name(shard.split, shard.index, shard.total)
    try:
        record = storage.read_json(storage.join(shard.store, RECORDS, f"{name}.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not storage.is_file(storage.join(shard.store, name)):
        return None
    return ShardInfo(**{**record, "value_counts": tuple(record["value_counts"])})


def write(shard: ShardPlan) -> ShardInfo:
    """Read, check and write one shard, then its record. Runs on any worker."""
    samples = (shard.read(item, shard.classes, shard.ignore_index) for item in shard.items)
    info = write_shard(shard.store, shard.split, shard.index, shard.total, samples)
    storage.write_json(storage.join(shard.store, RECORDS, f"{info.file}.json"), asdict(info))
    return info


def commit(plan: Plan) -> Store:
    """Write the manifest: from now on there is a store. The records, which it replaces, go."""
    splits: dict[str, list[ShardInfo]] = {}
    for shard in plan.shards:
        info = finished(shard)
        if info is None:
            raise DataError(f"shard {shard.index} of '{shard.split}' is not written: prepare again.")
        splits.setdefault(shard.split, []).append(info)
    about = {
        "layout": plan.layout,
        "source": plan.document["source"],
        "settings": plan.document["settings"],
        "plan": {"file": PLAN, "sha256": plan.digest},
    }
    store = write_manifest(plan.store, plan.classes, splits, about)
    storage.remove(storage.join(plan.store, RECORDS))
    return store


def current(plan: Plan) -> Store | None:
    """The finished store of this very plan; None where there is none."""
    if not storage.is_file(storage.join(plan.store, storage.MANIFEST)):
        return None
    store = Store.open(plan.store)
    same = store.manifest.get("plan", {}).get("sha256") == plan.digest
    return store if same else None


def clear(store: str) -> None:
    """Remove a store, finished or not: the manifest first, so that no half of it looks whole."""
    names = storage.list_names(store)
    ours = [n for n in names if n in (storage.MANIFEST, PLAN, RECORDS) or n.endswith(".parquet")]
    for name in sorted(ours, key=lambda n: n != storage.MANIFEST):
        storage.remove(storage.join(store, name))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, a short phrase each."""
    said = [f"{key}: {before.get(key)} → {after[key]}" for key in ("layout", "source") if before.get(key) != after[key]]
    old, new = before.get("settings", {}), after["settings"]
    said += [
        f"{key}: {old.get(key)} → {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if before.get("classes") != after["classes"]:
        said.append(f"classes: {_names(before.get('classes', []))} → {_names(after['classes'])}")
    files, other = _by_name(before.get("files", {})), _by_name(after["files"])
    counts = {
        "added": len(other.keys() - files.keys()),
        "removed": len(files.keys() - other.keys()),
        "changed": sum(files[name] != other[name] for name in files.keys() & other.keys()),
    }
    return said + [f"files: {count} {kind}" for kind, count in counts.items() if count] or [
        "its plan is of another form"
    ]


def _cut(store: str, listing: Listing, split: str, shard_mb: float) -> list[ShardPlan]:
    """Consecutive items, up to `shard_mb` a shard."""
    items = listing.splits[split]
    most_rows = max(LEAST_ROWS, -(-len(items) // PARALLEL_SHARDS))
    parts: list[list[Item]] = []
    size = 0
    for item in items:
        if not parts or len(parts[-1]) == most_rows or size + item.bytes > shard_mb * 2**20:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.bytes
    return [
        ShardPlan(store, split, index, len(parts), listing.read, listing.classes, listing.ignore_index, tuple(part))
        for index, part in enumerate(parts)
    ]


def _names(classes: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(info["name"]) for info in classes)


def _by_name(files: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    return {(split, name): value for split, items in files.items() for name, value in items.items()}
