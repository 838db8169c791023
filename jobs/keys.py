"""`sceneray keys`: who may call an endpoint. A key is shown once, when it is made; its file keeps a hash of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs import tables
from jobs.cli import main_of, say

if TYPE_CHECKING:
    from serve.keys import Key

HELP = "make, list and revoke the API keys of an endpoint"
EXAMPLE = "sceneray keys new --file keys.json --id alice --requests-per-s 5"
ACTIONS_HELP = """\
new     make a key for --id and print it, this once; the file gets its hash, and is written where there is none
list    who has a key, until when, and how much they may ask for
revoke  take the key of --id out of the file

Give the file's URL to the endpoint as api_keys_file: it reads it again within seconds of a change, without a restart.
To rotate a key, make one under another id, hand it out, and revoke the old one."""
_HEADER = ("id", "created", "expires", "requests/s", "pixels/s", "pixels/day", "burst", "state")
_LIMITS = ("requests_per_s", "pixels_per_s", "pixels_per_day", "burst_s", "expires")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{ACTIONS_HELP}"
    parser.add_argument("action", choices=tuple(ACTIONS), help="what to do")
    parser.add_argument("--file", required=True, metavar="URL", help="the key file: a path, or s3://...")
    parser.add_argument("--id", metavar="NAME", help="new, revoke: whose key; stands in the access log")
    parser.add_argument("--requests-per-s", type=float, metavar="N", help="new: requests a second (default: no limit)")
    parser.add_argument("--pixels-per-s", type=float, metavar="N", help="new: pixels a second (default: no limit)")
    parser.add_argument("--pixels-per-day", type=float, metavar="N", help="new: pixels a day (default: no limit)")
    parser.add_argument("--burst-s", type=float, metavar="S", help="new: seconds of a rate saved up (default: 10)")
    parser.add_argument("--expires", metavar="TIME", help="new: no longer valid from then on, as 2027-01-31T00:00:00Z")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb. The result never holds a key, only ids and limits."""
    from sceneray import storage
    from sceneray.errors import ConfigError

    if args.action != "new" and any(getattr(args, name) is not None for name in _LIMITS):
        raise ConfigError("limits belong to `sceneray keys new`: to change a key's, revoke it and make a new one.")
    if args.action != "list" and args.id is None:
        raise ConfigError(f"`sceneray keys {args.action}` needs --id: whose key?")
    args.file = storage.absolute(args.file)
    return ACTIONS[args.action](args)


def new(args: argparse.Namespace) -> dict[str, Any]:
    """Make a key, add its hash to the file, print the key."""
    from sceneray.config import validate
    from serve import keys

    secret = keys.new_key()
    limits = {name: value for name in _LIMITS if (value := getattr(args, name)) is not None}
    about = {"id": args.id, "sha256": keys.digest_of(secret), "created": datetime.now(UTC).replace(microsecond=0)}
    made = validate(keys.Key, about | limits, "the command line")

    def added(known: tuple[Key, ...]) -> tuple[Key, ...]:
        _refuse_known(args, known)
        return (*known, made)

    _change(args.file, added, may_create=True)
    say(f"the key of {made.id}, shown this once; {args.file} keeps its hash:")
    print(secret)
    return {"file": args.file, **_row(made)}


def list_(args: argparse.Namespace) -> dict[str, Any]:
    """Print the keys of a file."""
    from serve import keys

    rows = [_row(key) for key in keys.read(args.file)]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    tables.show(_HEADER, cells)
    return {"file": args.file, "keys": rows}


def revoke(args: argparse.Namespace) -> dict[str, Any]:
    """Take a key out of the file."""
    from sceneray.errors import ConfigError, unknown_name

    def without(known: tuple[Key, ...]) -> tuple[Key, ...]:
        left = tuple(key for key in known if key.id != args.id)
        if len(left) == len(known):
            raise ConfigError(unknown_name("key", args.id, [key.id for key in known]))
        return left

    _change(args.file, without, may_create=False)
    say(f"{args.id} is out of {args.file}; an endpoint that reads it refuses the key within seconds.")
    return {"file": args.file, "id": args.id}


def _refuse_known(args: argparse.Namespace, known: tuple[Key, ...]) -> None:
    from sceneray.errors import ConfigError

    if any(key.id == args.id for key in known):
        raise ConfigError(
            f"{args.file} has a key of {args.id} already: choose another --id, or revoke it first "
            f"(`sceneray keys revoke --file {args.file} --id {args.id}`)."
        )


def _change(url: str, change: Callable[[tuple[Key, ...]], tuple[Key, ...]], may_create: bool) -> None:
    """Replace the file's keys by what `change` makes of them, unless somebody else was faster (ConflictError)."""
    from sceneray import storage
    from serve import keys

    tag = storage.etag(url)
    known = () if tag is None and may_create else keys.read(url)
    storage.compare_and_swap(url, tag, keys.to_json(change(known)))


def _row(key: Key) -> dict[str, Any]:
    """A key as --json and the table have it, in the table's order."""

    def moment(at: datetime | None) -> str | None:
        return None if at is None else at.isoformat(timespec="seconds")

    return {
        "id": key.id,
        "created": moment(key.created),
        "expires": moment(key.expires),
        "requests_per_s": key.requests_per_s,
        "pixels_per_s": key.pixels_per_s,
        "pixels_per_day": key.pixels_per_day,
        "burst_s": key.burst_s,
        "state": "valid" if key.is_valid(datetime.now(UTC)) else "expired",
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


ACTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"new": new, "list": list_, "revoke": revoke}

if __name__ == "__main__":
    raise SystemExit(main_of("keys"))
