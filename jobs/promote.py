"""`sceneray promote`: a bundle becomes the champion of a model in a repository, once it has passed the gates."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.cli import main_of, say

if TYPE_CHECKING:
    from sceneray.promotion import Candidate, Gate

HELP = "make a bundle the champion of a model repository, once it has passed the gates"
EXAMPLE = "sceneray promote bundles/town --repo models"
GATES_HELP = """\
The gates, each reported with what was found; nothing is moved where one refuses:
  bundle    every file has its digest, and the network loads (--force does not pass it)
  golden    the golden image is answered as for the exporter: at least 99.9 % of the pixels, all of them on a machine
            and library versions like its
  miou      not below the champion's by more than --margin; as recorded where both were measured on one split of one
            store, else both are scored on --store
  classes   names and order are the champion's"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{GATES_HELP}"
    parser.add_argument("bundle", metavar="BUNDLE", help="URL of a bundle, or REPO/MODEL@VERSION")
    parser.add_argument("--repo", required=True, metavar="REPO", help="URL of the model repository")
    parser.add_argument("--name", metavar="N", help="model in the repository (default: the bundle's name)")
    parser.add_argument("--version", metavar="V", help="version in the repository (default: the bundle's version)")
    parser.add_argument("--store", metavar="STORE", help="dataset store to score both on")
    parser.add_argument("--split", default="val", help="split of that store (default: val)")
    parser.add_argument("--margin", type=float, default=0.005, help="mIoU that may be missing (default: 0.005)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--force", action="store_true", help="pass refusing gates, and write that down")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Examine the bundle and promote it; returns the gates and the aliases."""
    from sceneray import promotion
    from sceneray.errors import BundleError

    settings = promotion.Settings(args.store, args.split, args.margin, args.device, say)
    try:
        candidate = promotion.open_candidate(args.bundle, args.repo, args.name, args.version)
    except BundleError as error:
        _print_gate(promotion.Gate("bundle", False, str(error)), False)
        raise
    whole = f"every file is whole; digest {candidate.source.digest[:12]}"
    gates = [promotion.Gate("bundle", True, whole)]
    _print_gate(gates[0], args.force)
    if promotion.is_champion(candidate):
        print(f"version {candidate.version} is the champion of {candidate.seen.url} already")
        return _result(candidate, gates, [], candidate.seen.previous, moved=False)
    gates += promotion.examine(candidate, settings, lambda gate: _print_gate(gate, args.force))
    skipped = promotion.refused(gates, args.force)
    model = promotion.publish(candidate, skipped)
    before = f", before it {model.previous.version}" if model.previous else ""
    print(f"version {candidate.version} is the champion of {model.url}{before}")
    return _result(candidate, gates, skipped, model.previous, moved=True)


def _print_gate(gate: Gate, force: bool) -> None:
    state = "passed" if gate.passed else "forced" if force else "refused"
    print(f"{gate.name:<8} {state:<8} {gate.found}")


def _result(candidate: Candidate, gates: list[Gate], skipped: list[Gate], previous: Any, moved: bool) -> dict[str, Any]:
    return {
        "model": candidate.seen.url,
        "version": candidate.version,
        "digest": candidate.source.digest,
        "bundle": f"{candidate.seen.url}/{candidate.version}",
        "previous": asdict(previous) if previous else None,
        "moved": moved,
        "gates": [asdict(gate) for gate in gates],
        "skipped": [gate.name for gate in skipped],
    }


if __name__ == "__main__":
    raise SystemExit(main_of("promote"))
