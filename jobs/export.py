"""`sceneray export`: a checkpoint becomes a bundle, and the bundle is run before this returns."""

from __future__ import annotations

import argparse
import re
from typing import Any

from jobs.cli import main_of, say
from sceneray.errors import ConfigError

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
    parser.add_argument(
        "--input",
        choices=("native", "resize", "window"),
        default="native",
        help="what a server gives the network: the photograph as it is, scaled to --long-side, or in windows of "
        "--window pixels (default: native)",
    )
    parser.add_argument("--long-side", type=int, metavar="PIXELS", help="of the network's input with --input resize")
    parser.add_argument("--window", type=int, metavar="PIXELS", help="side of a window; default: the training crop's")
    parser.add_argument(
        "--warm", nargs="+", metavar="HxW", help="shapes a server runs before it is ready; default: the training crop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that stands at BUNDLE")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the bundle, and prove it."""
    from sceneray import storage
    from sceneray.export import export

    folder = storage.basename(storage.absolute(args.bundle))
    name = args.name or re.sub(r"[^A-Za-z0-9._+-]+", "-", folder)[:64]
    result = export(args.checkpoint, args.bundle, name, args.model_version, args.overwrite, _rule(args))
    say(f"the written bundle answers all {result['golden_pixels']} pixels of its golden image as the checkpoint does")
    print(f"bundle {result['bundle']}")
    print(f"model  {result['name']}, version {result['version']}, {result['bytes'] / 2**20:.1f} MiB")
    return result


def _rule(args: argparse.Namespace) -> dict[str, Any]:
    """The input rule as far as it was given."""
    if args.input == "resize" and args.long_side is None:
        raise ConfigError("--input resize needs --long-side PIXELS.")
    rule: dict[str, Any] = {"rule": args.input}
    for name, value in (("long_side", args.long_side), ("window", args.window)):
        if value is not None:
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} takes a number of pixels above 0, got {value}.")
            rule[name] = value
    if args.warm is not None:
        rule["warm"] = [_shape(text) for text in args.warm]
    return rule


def _shape(text: str) -> list[int]:
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ConfigError(f"--warm takes shapes as HEIGHTxWIDTH (480x640), got {text!r}.")
    return [int(side) for side in sides]


if __name__ == "__main__":
    raise SystemExit(main_of("export"))
