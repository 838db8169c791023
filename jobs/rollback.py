"""`sceneray rollback`: the champion of a model and the one before it change places."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from jobs.cli import main_of

HELP = "make the previous bundle of a model the champion again; once more takes that back"
EXAMPLE = "sceneray rollback --repo models --name town"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--repo", required=True, metavar="REPO", help="URL of the model repository")
    parser.add_argument("--name", required=True, metavar="N", help="model in the repository")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Exchange the two; returns the aliases. Every file of the previous bundle is read first."""
    from sceneray import repository

    model = repository.rollback(args.repo, args.name)
    assert model.champion is not None and model.previous is not None
    print(f"version {model.champion.version} is the champion of {model.url}, before it {model.previous.version}")
    return {"model": model.url, "champion": asdict(model.champion), "previous": asdict(model.previous)}


if __name__ == "__main__":
    raise SystemExit(main_of("rollback"))
