"""`sceneray export`: a checkpoint becomes a bundle, and the bundle is run before this returns."""

from __future__ import annotations

import argparse
import re
from typing import Any

from jobs.cli import main_of, say

HELP = "make a bundle of a checkpoint, and run what was written"
EXAMPLE = "sceneray export runs/camvid/best bundles/camvid"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="RUN/best, RUN/last or a checkpoint folder, at any URL"
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="URL of the folder to write")
    parser.add_argument("--name", help="what the model is called; default: the last part of BUNDLE")
    parser.add_argument("--model-version", metavar="V", help="default: the start of the checkpoint's digest")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that stands at BUNDLE")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the bundle, and prove it."""
    from sceneray import storage
    from sceneray.export import export

    folder = storage.basename(storage.absolute(args.bundle))
    name = args.name or re.sub(r"[^A-Za-z0-9._+-]+", "-", folder)[:64]
    result = export(args.checkpoint, args.bundle, name, args.model_version, args.overwrite)
    say(f"the written bundle answers all {result['golden_pixels']} pixels of its golden image as the checkpoint does")
    print(f"bundle {result['bundle']}")
    print(f"model  {result['name']}, version {result['version']}, {result['bytes'] / 2**20:.1f} MiB")
    return result


if __name__ == "__main__":
    raise SystemExit(main_of("export"))
