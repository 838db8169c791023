"""What every verb shares: parsing, --json, --debug, exit codes, a clean Ctrl-C.

A verb is a module with `HELP` (one line), `EXAMPLE`, `add_arguments(parser)` and `run(args) -> dict`. `run` returns
its result as plain JSON values and raises a ScenerayError where it could not do what it was asked.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sceneray.errors import ScenerayError

# In the order of a user's day. Modules are imported when their verb runs.
VERBS = {
    "demo": "jobs.demo",
    "prepare": "jobs.prepare",
    "train": "jobs.train",
    "runs": "jobs.runs",
    "checkpoints": "jobs.checkpoints",
    "tune": "tune.search",
    "evaluate": "jobs.evaluate",
    "export": "jobs.export",
    "promote": "jobs.promote",
    "rollback": "jobs.rollback",
    "models": "jobs.models",
    "predict": "jobs.predict",
    "serve": "jobs.serve",
    "keys": "jobs.keys",
    "submit": "jobs.submit",
    "watch": "jobs.watch",
}
EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "SCENERAY_DEBUG"  # set by --debug, so that what a verb starts shows its logs too


def main_of(verb: str, argv: Sequence[str] | None = None) -> int:
    """Parse `argv` for one verb, run it, and return the exit code (0: it did what it was asked)."""
    module = importlib.import_module(VERBS[verb])
    args = arguments_of(verb, argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a log, answers stand between the progress they belong to
    if args.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    # SIGTERM (a scheduler, `kill`) stops a verb as cleanly as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = module.run(args)
        if args.json is not None:
            _write_json(args.json, result)
    except ScenerayError as error:
        # An error of a Ray task arrives with the remote traceback as its text; its cause has the sentence.
        return _fail(args.debug, str(getattr(error, "cause", error)), error.exit_code)
    except KeyboardInterrupt:
        return _fail(args.debug, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        return 1
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"
        return _fail(args.debug, text, 1)
    return 0


def arguments_of(verb: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments of one verb; options may stand anywhere, also between a settings file and its key=value."""
    parser = parser_of(verb)
    try:
        return parser.parse_intermixed_args(argv)
    except TypeError:  # `submit` hands on all that follows the submitted verb: the order counts there
        return parser.parse_args(argv)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb's arguments."""
    module = importlib.import_module(VERBS[verb])
    parser = argparse.ArgumentParser(
        prog=f"sceneray {verb}",
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON to FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def say(text: str) -> None:
    """A line of progress, for people: on stderr, so that stdout stays a verb's answer."""
    print(text, file=sys.stderr, flush=True)


def _write_json(path: Path, result: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise ScenerayError(
            f"cannot write the result to {path}: {error.strerror}. Give --json a writable path."
        ) from error


def _fail(debug: bool, text: str, code: int) -> int:
    if debug:
        traceback.print_exc()
    say(f"sceneray: {text}")
    return code


def _interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
