"""`sceneray checkpoints`: what a run has saved: list it, check every byte, remove what is old, look into one."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs import tables
from jobs.cli import main_of

if TYPE_CHECKING:
    from sceneray.retention import Entry
    from sceneray.storage import Committed

HELP = "list, verify, prune or show the checkpoints of a run"
EXAMPLE = "sceneray checkpoints list runs/town"
ACTIONS_HELP = """\
list RUN     every checkpoint folder: step, attempt, size, val mIoU, and what RUN/best and RUN/last name
verify URL   read every file of every checkpoint of a run, or of one, and compare it with the manifest
prune RUN    remove all but the newest and the best; never what RUN/best or RUN/last names
show URL     what one checkpoint holds: position, scores, classes, settings, tensors"""
_HEADER = ("checkpoint", "step", "attempt", "size", "val mIoU", "pointers", "age", "state")
_READERS = 8  # requests on their way at once
_HEADER_BYTES = 100 * 10**6  # the largest header that safetensors itself accepts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{ACTIONS_HELP}"
    parser.add_argument("action", choices=tuple(ACTIONS), help="what to do")
    parser.add_argument("url", metavar="URL", help="run folder; for verify and show also RUN/best or one checkpoint")
    parser.add_argument("--keep", type=int, metavar="N", help="prune: newest checkpoints kept (default: 3)")
    parser.add_argument("--keep-best", type=int, metavar="K", help="prune: best-scoring ones kept (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    parser.add_argument("--tensors", action="store_true", help="show: a line for each tensor")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns what the action found."""
    from sceneray import storage
    from sceneray.errors import ConfigError

    belongs = {"--keep": "prune", "--keep-best": "prune", "--dry-run": "prune", "--tensors": "show"}
    for option, action in belongs.items():
        if getattr(args, option.strip("-").replace("-", "_")) not in (None, False) and args.action != action:
            raise ConfigError(f"{option} belongs to `sceneray checkpoints {action}`, not to {args.action}.")
    args.url = storage.absolute(args.url)
    result: dict[str, Any] = ACTIONS[args.action](args)
    return result


def list_(args: argparse.Namespace) -> dict[str, Any]:
    """Print all checkpoint folders of a run, newest first."""
    from sceneray import retention

    every, pointed = _entries(args.url), retention.pointers(args.url)
    now = datetime.now(UTC)
    with ThreadPoolExecutor(_READERS) as pool:
        written = dict(zip([e.name for e in every], pool.map(_written_at, every), strict=True))
    rows = []
    for entry in reversed(every):
        at = written[entry.name]
        rows.append(
            {
                "name": entry.name,
                "step": entry.step,
                "attempt": entry.attempt,
                "bytes": entry.bytes,
                "committed": entry.committed is not None,
                "problem": entry.problem,
                "miou": entry.miou,
                "pointers": [pointer for pointer, name in pointed.items() if name == entry.name],
                "written_at": None if at is None else at.isoformat(timespec="seconds"),
                "age_s": None if at is None else max(0.0, (now - at).total_seconds()),
            }
        )
    tables.show(_HEADER, [_cells(row) for row in rows])
    lost = _lost(pointed, every, args.url)
    for line in lost:
        print(line)
    return {"run": args.url, "checkpoints": rows, "pointers": pointed, "lost_pointers": lost}


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Compare every byte with the manifests; raises CheckpointError, after a line for each, where one differs."""
    from sceneray import retention
    from sceneray.errors import CheckpointError

    one = _one(args.url)
    run_url = one.rsplit("/", 2)[0] if one else args.url
    every = retention.entries(run_url, {one.removeprefix(f"{run_url}/"): 0}) if one else _entries(run_url)
    rows = [_verified(entry) for entry in every]
    # A save that never finished is no damage in a run, which goes on from another; asked for by name, it is.
    damaged = [row["name"] for row in rows if row["problems"] and (one or not row["unfinished"])]
    damaged += [] if one else _lost(retention.pointers(run_url), every, run_url)
    result = {"run": run_url, "checkpoints": rows, "damaged": damaged}
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(rows)} checkpoints of {run_url} cannot be used: {', '.join(damaged)}. A run goes "
            "on from the newest whole one by itself; remove the folder of a damaged one."
        )
    return result


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Remove what neither the newest, nor the best, nor a pointer needs."""
    from sceneray import retention
    from sceneray.errors import ConfigError

    keep = 3 if args.keep is None else args.keep
    keep_best = 1 if args.keep_best is None else args.keep_best
    if keep < 1 or keep_best < 0:
        raise ConfigError(f"--keep must be at least 1 and --keep-best at least 0, got {keep} and {keep_best}.")
    every, pointed = _entries(args.url), retention.pointers(args.url)
    going = retention.removable(every, set(pointed.values()), keep, keep_best)
    for entry in going:
        print(f"{'would remove' if args.dry_run else 'removing'} {entry.name}  {tables.size(entry.bytes)}")
        if not args.dry_run:
            retention.remove(args.url, entry.name)
    freed = sum(entry.bytes for entry in going)
    removed = [entry.name for entry in going]
    kept = [entry.name for entry in every if entry not in going]
    print(f"{len(removed)} of {len(every)} checkpoints, {tables.size(freed)}; {len(kept)} stay")
    return {"run": args.url, "removed": removed, "kept": kept, "bytes": freed, "dry_run": args.dry_run}


def show(args: argparse.Namespace) -> dict[str, Any]:
    """Print what one checkpoint holds; of the weights only the headers are read."""
    from sceneray import storage
    from sceneray.errors import CheckpointError, StorageError

    url = _one(args.url)
    if url is None:
        raise CheckpointError(f"{args.url} is no checkpoint. Give RUN/best, RUN/last or one below RUN/checkpoints.")
    try:
        committed = storage.open_committed(url)
        if committed is None:
            raise CheckpointError(f"no committed checkpoint at {url}: `sceneray checkpoints list RUN` shows all.")
        state = json.loads(committed.read("state.json"))
        tensors = {n: tensor_headers(committed, n) for n in committed.manifest["files"] if n.endswith(".safetensors")}
    except StorageError as error:
        raise CheckpointError(f"{error} `sceneray checkpoints list RUN` shows the others.") from error
    sizes = {name: entry["bytes"] for name, entry in committed.manifest["files"].items()}
    changed = _changed_settings(committed)
    result = {"checkpoint": url, "digest": committed.digest, "state": state, "bytes": sizes, "tensors": tensors}
    _print_state(url, state, changed)
    _print_tensors(tensors, sizes, args.tensors)
    return {**result, "settings_changed": changed}


ACTIONS = {"list": list_, "verify": verify, "prune": prune, "show": show}


def tensor_headers(committed: Committed, name: str) -> dict[str, dict[str, Any]]:
    """`dtype` and `shape` of each tensor in a safetensors file, without reading the tensors.

    The file begins with the length of its header (8 bytes, little-endian) and the header itself, JSON:
    https://github.com/huggingface/safetensors#format
    """
    from sceneray import storage
    from sceneray.errors import StorageError
    from sceneray.retries import retry

    url, size = storage.join(committed.url, name), committed.manifest["files"][name]["bytes"]
    fs, path = storage.filesystem(url)

    def part(start: int, end: int) -> bytes:
        data: bytes = retry(f"reading {url}", lambda: fs.cat_file(path, start=start, end=end))
        return data

    try:
        length = int.from_bytes(part(0, 8), "little")
        if not 0 < length <= min(size - 8, _HEADER_BYTES):
            raise ValueError(f"its header says that it is {length} bytes long")
        header = json.loads(part(8, 8 + length))
        header.pop("__metadata__", None)
        return {key: {"dtype": value["dtype"], "shape": value["shape"]} for key, value in header.items()}
    except FileNotFoundError as error:
        raise StorageError(f"{committed.url} is damaged: '{name}' is in the manifest but is missing.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{url} is damaged: {error}.") from error


def _entries(run_url: str) -> list[Entry]:
    """All checkpoint folders of a run; raises CheckpointError where there are none."""
    from sceneray import retention
    from sceneray.errors import CheckpointError

    found = retention.entries(run_url)
    if not found:
        raise CheckpointError(f"no checkpoints below {run_url}/{retention.FOLDER}. Give a run folder that has some.")
    return found


def _one(url: str) -> str | None:
    """The checkpoint folder that `url` or the pointer at `url` means; None where it is a run folder."""
    from sceneray import retention

    folder = retention.resolve(url)
    return folder if retention.is_name(folder) else None


def _lost(pointed: dict[str, str], every: list[Entry], run_url: str) -> list[str]:
    """A line for each pointer that names no committed checkpoint."""
    whole = {entry.name for entry in every if entry.committed is not None}
    return [f"{run_url}/{pointer} → {name}: not there" for pointer, name in pointed.items() if name not in whole]


def _verified(entry: Entry) -> dict[str, Any]:
    """Read all files of one checkpoint, and print how it is."""
    from sceneray.errors import StorageError

    problems = [entry.problem] if entry.problem else []
    files = entry.committed.manifest["files"] if entry.committed else {}
    for name in files:
        try:
            assert entry.committed is not None
            entry.committed.read(name)
        except StorageError as error:
            if str(error) not in problems:
                problems.append(str(error))
    total = sum(file["bytes"] for file in files.values())
    print(f"{entry.name}  {'; '.join(problems) or f'whole: {len(files)} files, {tables.size(total)}'}")
    about = {"name": entry.name, "unfinished": entry.unfinished, "files": len(files), "bytes": total}
    return {**about, "problems": problems}


def _written_at(entry: Entry) -> datetime | None:
    """When the manifest was written; None where there is none, or where the file system does not know."""
    from sceneray import storage
    from sceneray.retries import retry

    if entry.committed is None:
        return None
    fs, path = storage.filesystem(storage.join(entry.committed.url, storage.MANIFEST))
    try:
        modified: datetime = retry(f"reading the age of {entry.name}", lambda: fs.modified(path))
    except (NotImplementedError, FileNotFoundError):
        return None
    return modified


def _cells(row: dict[str, Any]) -> list[str]:
    state = row["problem"] or "committed"
    age = "-" if row["age_s"] is None else f"{tables.age(row['age_s'])} ago"
    miou = "-" if row["miou"] is None else f"{row['miou']:.4f}"
    short = row["name"].rpartition("/")[2]
    pointers = ", ".join(row["pointers"]) or "-"
    return [short, str(row["step"]), str(row["attempt"]), tables.size(row["bytes"]), miou, pointers, age, state]


def _changed_settings(committed: Committed) -> list[str] | None:
    """Settings that RUN/config.yaml has otherwise now; None where they cannot be compared."""
    from sceneray import config
    from sceneray.config import TrainSettings
    from sceneray.errors import ConfigError

    run_url = committed.url.rsplit("/", 2)[0]
    try:
        then, now = (config.load(TrainSettings, f"{url}/config.yaml") for url in (committed.url, run_url))
    except ConfigError:
        return None  # another version's settings, or a checkpoint that was copied out of its run
    return config.differences(then, now, ignore=("run",))  # a run folder may be copied


def _print_state(url: str, state: dict[str, Any], changed: list[str] | None) -> None:
    print(url)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in state.get("metrics", {}).items() if value is not None)
    classes = [info["name"] for info in state.get("classes", [])]
    lines = {
        "step": f"{state['step']}, position {state.get('position', '-')}, attempt {state['attempt']}",
        "scores": scores or "none: it was saved between two evaluations",
        "classes": f"{len(classes)}: {', '.join(classes)}",
        "store": str(state.get("store_digest", "-")),
        "settings": "; ".join(changed) if changed else "as in RUN/config.yaml",
    }
    if changed is None:
        lines["settings"] = "cannot be compared with RUN/config.yaml"
    for name, text in lines.items():
        print(f"  {name:<9} {text}")


def _print_tensors(tensors: dict[str, dict[str, dict[str, Any]]], sizes: dict[str, int], each: bool) -> None:
    for file, headers in tensors.items():
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in Counter(h["dtype"] for h in headers.values()).items())
        print(f"  {file}: {len(headers)} tensors ({kinds or 'none'}), {tables.size(sizes[file])}")
        if each:
            for name, header in headers.items():
                print(f"    {name}  {header['dtype']} {'×'.join(map(str, header['shape'])) or 'scalar'}")


if __name__ == "__main__":
    raise SystemExit(main_of("checkpoints"))
