"""What a batch of predictions will do and what of it is done, all of it in files beside the masks.

    OUT/predictions/plan.json          which bundle and which photos: only the same ones go on in OUT
    OUT/predictions/part-00000.jsonl   a finished part: one line for each of its photos, a mask or an error
    OUT/predictions.json               written at the end: counts, time, errors

A part's file is written after its masks and in one piece, so that a part is either done or done again. What is done is
decided by these files alone, not by the memory of a driver or of Ray.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sceneray import storage
from sceneray.errors import ConflictError, DataError, StorageError

FORMAT, VERSION = "sceneray-predictions", 1
FOLDER, PLAN, SUMMARY = "predictions", "plan.json", "predictions.json"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MASK, OVERLAY = ".mask.png", ".overlay.jpg"
# Parts follow from the list alone, never from the cluster: a batch goes on with any number of workers.
PARTS, LEAST_PHOTOS, MOST_PHOTOS = 256, 8, 128
READERS = 16
_PART = re.compile(r"part-\d{5,}\.jsonl")

Row = dict[str, Any]


@dataclass(frozen=True)
class Photo:
    """A photo to segment: its URL, its size where the listing told it, and the name of its results below OUT."""

    url: str
    size: int | None
    name: str


@dataclass(frozen=True)
class Part:
    """Photos that one worker does in one go; plain values, sent to it."""

    index: int
    photos: tuple[Photo, ...]


@dataclass(frozen=True)
class Task:
    """What all workers share: where the results go, the network, and what is written; plain values too."""

    out: str
    bundle: str
    model: dict[str, str]  # name, version, digest
    overlay: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Done:
    """A finished part, added up: `failed` are its rows with an error, `shares` {class id: (sum of shares, photos)}."""

    index: int
    photos: int
    failed: tuple[Row, ...]
    shares: dict[int, tuple[float, int]]


@dataclass(frozen=True)
class Plan:
    """A whole batch: `document` is plan.json, all that decides the results."""

    task: Task
    parts: tuple[Part, ...]
    document: dict[str, Any]

    @property
    def photos(self) -> int:
        """How many photos there are."""
        return sum(len(part.photos) for part in self.parts)


def make_plan(task: Task, images: Sequence[str], part_size: int | None = None) -> Plan:
    """List the images and cut the list into parts of `part_size` photos (None: by their number)."""
    listed = list_images(images)
    names = result_names([path for _, path, _ in listed])
    photos = [Photo(url, size, name) for (url, _, size), name in zip(listed, names, strict=True)]
    size = part_size or min(max(LEAST_PHOTOS, -(-len(photos) // PARTS)), MOST_PHOTOS)
    parts = [Part(i, tuple(photos[i * size : (i + 1) * size])) for i in range(-(-len(photos) // size))]
    whole = hashlib.sha256(json.dumps([[photo.url, photo.name] for photo in photos]).encode())
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": task.model,
        "photos": len(photos),
        "photos_sha256": whole.hexdigest(),
        "part_size": size,
        "overlay": task.overlay,
    }
    return Plan(task, tuple(parts), document)


def list_images(images: Iterable[str]) -> list[tuple[str, str, int | None]]:
    """(URL, path, size) of every image, each once: a file by its name, a folder with all the images below it.

    Masks and overlays are no images: OUT may lie in the folder. Raises DataError where nothing is found.
    """
    found: dict[str, tuple[str, str, int | None]] = {}
    for image in images:
        url = storage.absolute(image)
        if storage.is_file(url):
            found.setdefault(url, (url, storage.basename(url), None))
            continue
        inside = [item for item in storage.walk_files(url) if _is_image(item[0])]
        if not inside:
            raise DataError(f"no image at {url}: give a file, or a folder with {', '.join(SUFFIXES)} files below it.")
        for path, size in inside:
            found.setdefault(storage.join(url, path), (storage.join(url, path), path, size))
    return list(found.values())


def result_names(paths: Sequence[str]) -> list[str]:
    """The name of each image's results: its path without the suffix, and no two alike on any file system.

    Images that differ in nothing but their suffix keep it; what is alike even then is numbered.

    >>> result_names(["a.jpg", "b/c.jpg", "b/c.png"])
    ['a', 'b/c.jpg', 'b/c.png']
    """
    # An object's key may hold what would lead out of OUT once it is a path on a disk.
    safe = ["/".join("_" if part in ("", ".", "..") else part for part in path.split("/")) for path in paths]
    stems = [str(PurePosixPath(path).with_suffix("")) for path in safe]
    alike = Counter(stem.lower() for stem in stems)
    names, taken = [], set()
    for path, stem in zip(safe, stems, strict=True):
        plain = stem if alike[stem.lower()] == 1 else path
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def begin(plan: Plan, overwrite: bool = False, retry_errors: bool = False) -> dict[int, Done]:
    """Make OUT ready for `plan` and return the parts that are finished there, by their index.

    With `retry_errors` a part with an error in it counts as not finished. Raises DataError where OUT holds another
    batch, with what differs.
    """
    folder = storage.join(plan.task.out, FOLDER)
    if overwrite:
        clear(plan.task.out)
    url = storage.join(folder, PLAN)
    try:
        storage.create(url, (json.dumps(plan.document, indent=1) + "\n").encode())
    except ConflictError:
        before = storage.read_json(url)
        if before != plan.document:
            raise DataError(
                f"{plan.task.out} holds the results of something else: {'; '.join(changes(before, plan.document))}. "
                "Give another --out, or --overwrite to do all of it anew."
            ) from None
    there = set(storage.list_names(folder))
    with ThreadPoolExecutor(READERS) as pool:
        found = list(
            pool.map(lambda part: read_part(plan.task, part) if part_name(part) in there else None, plan.parts)
        )
    kept = [done for done in found if done is not None and not (retry_errors and done.failed)]
    if len(kept) < len(plan.parts):
        storage.remove(storage.join(plan.task.out, SUMMARY))  # it told the end of an earlier run
    return {done.index: done for done in kept}


def part_name(part: Part) -> str:
    """The name of a part's file."""
    return f"part-{part.index:05}.jsonl"


def write_part(task: Task, part: Part, rows: Sequence[Row]) -> Done:
    """Write the file that makes a part finished; `rows` has a row for each of its photos, in their order."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.write_bytes(storage.join(task.out, FOLDER, part_name(part)), lines.encode())
    return added_up(part, rows)


def read_part(task: Task, part: Part) -> Done | None:
    """A part as it was finished; None where its file is of another model or other photos, told by URL and size.

    So a photo that was replaced is done again. And a worker whose driver died may still write a part's file after OUT
    was given to another batch.
    """
    try:
        rows = [json.loads(line) for line in storage.read_bytes(_part_url(task, part)).decode().splitlines()]
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(
            f"{_part_url(task, part)} is damaged: {error}. Remove it; its part is done again."
        ) from error
    ours = [about(task, photo) for photo in part.photos]
    same = len(rows) == len(ours) and all(row.items() >= head.items() for row, head in zip(rows, ours, strict=True))
    return added_up(part, rows) if same else None


def added_up(part: Part, rows: Sequence[Row]) -> Done:
    """The rows of a part, added up."""
    return Done(part.index, len(part.photos), tuple(row for row in rows if "error" in row), add_shares(rows))


def add_shares(rows: Iterable[Mapping[str, Any]]) -> dict[int, tuple[float, int]]:
    """By a class's id, the sum of its shares and the number of rows (images) it is in."""
    shares: dict[int, tuple[float, int]] = {}
    for entry in (entry for row in rows for entry in row.get("classes", ())):
        total, images = shares.get(entry["id"], (0.0, 0))
        shares[entry["id"]] = (total + entry["share"], images + 1)
    return shares


def about(task: Task, photo: Photo) -> Row:
    """What every line tells: which photo, how large the listing said it is, and which model."""
    return {"image": photo.url, "image_bytes": photo.size, "model": task.model}


def error_row(task: Task, photo: Photo, why: str) -> Row:
    """The line of a photo that has no mask."""
    return {**about(task, photo), "error": why}


def changes(before: Any, after: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, a short phrase each."""
    if not isinstance(before, dict) or (before.get("format"), before.get("version")) != (FORMAT, VERSION):
        return [f"{FOLDER}/{PLAN} is not a plan that this version reads"]
    said = []
    if before["model"] != after["model"]:
        said.append(f"model: {_called(before['model'])} → {_called(after['model'])}")
    if before["photos_sha256"] != after["photos_sha256"]:
        said.append(f"photos: {before['photos']} → {after['photos']}, not the same ones")
    said += [f"{key}: {before[key]} → {after[key]}" for key in ("part_size", "overlay") if before[key] != after[key]]
    return said


def clear(out: str) -> None:
    """Remove what tells of an earlier batch in OUT; masks stay until they are written again."""
    storage.remove(storage.join(out, SUMMARY))
    folder = storage.join(out, FOLDER)
    for name in storage.list_names(folder):
        if name == PLAN or _PART.fullmatch(name):
            storage.remove(storage.join(folder, name))


def _part_url(task: Task, part: Part) -> str:
    return storage.join(task.out, FOLDER, part_name(part))


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not path.endswith((MASK, OVERLAY))


def _called(model: Mapping[str, str]) -> str:
    return f"{model['name']} {model['version']} ({model['digest'][:12]})"
