"""`sceneray models`: what a model repository holds, and which version of each model is the champion."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jobs import tables
from jobs.cli import main_of

if TYPE_CHECKING:
    from sceneray.repository import Model

HELP = "list the models of a repository: versions, champion and previous, mIoU, and the last moves"
EXAMPLE = "sceneray models models"
_HEADER = ("model", "version", "alias", "mIoU", "digest", "state")
_READERS = 8  # requests on their way at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("repo", metavar="REPO", help="URL of the model repository")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a line for each version; returns the models with their history."""
    from sceneray import repository, storage
    from sceneray.errors import BundleError

    repo = storage.absolute(args.repo)
    models = [repository.read(repo, name) for name in repository.names(repo)]
    if not models:
        raise BundleError(
            f"no models in {repo}. `sceneray promote BUNDLE --repo {args.repo}` puts the first one there."
        )
    found = [_described(model) for model in models]
    tables.show(_HEADER, [_cells(one["model"], row) for one in found for row in one["versions"]])
    for one in found:
        for move in one["history"][-1:]:
            past = ", ".join(gate["gate"] for gate in move["skipped"])
            what = f"{one['model']}: {move['by']} of {move['champion']['version']}, {move['moved_at']}"
            print(f"{what}, past {past}" if past else what)
    return {"repo": repo, "models": found}


def _described(model: Model) -> dict[str, Any]:
    """A model with a row for each version."""
    from sceneray import repository, storage

    with ThreadPoolExecutor(_READERS) as pool:
        rows = list(pool.map(lambda version: _row(model, version), repository.versions(model)))
    return {"model": storage.basename(model.url), "versions": rows, "history": list(model.history)}


def _row(model: Model, version: str) -> dict[str, Any]:
    """One version, as far as its manifest and its bundle.json tell; its files are not read."""
    from sceneray import repository
    from sceneray.errors import BundleError

    named = {"champion": model.champion, "previous": model.previous}
    row: dict[str, Any] = {
        "version": version,
        "aliases": [alias for alias, one in named.items() if one is not None and one.version == version],
        "digest": model.versions.get(version),
        "miou": None,
        "problem": None,
    }
    try:
        committed = repository.standing(model, version)
        return row | {"digest": committed.digest, "miou": repository.recorded_miou(repository.about_of(committed))}
    except BundleError as error:
        return row | {"problem": str(error)}


def _cells(model: str, row: dict[str, Any]) -> list[str]:
    miou = "-" if row["miou"] is None else f"{row['miou']:.4f}"
    alias = ", ".join(row["aliases"]) or "-"
    return [model, row["version"], alias, miou, (row["digest"] or "-")[:12], row["problem"] or "committed"]


if __name__ == "__main__":
    raise SystemExit(main_of("models"))
