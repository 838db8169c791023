"""`sceneray submit VERB ...`: run a verb on a cluster as a Ray job, with this code and the resolved settings.

What travels: the four packages as they are here (`py_modules`), one file of resolved settings (`working_dir`), and the
environment variables in FORWARDED. No credentials: the cluster's machines have roles of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import logging
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.cli import VERBS, main_of, say
from sceneray import config, storage
from sceneray.errors import ConfigError, Interrupted, ScenerayError

HELP = "run prepare, train, tune, evaluate, export or predict on a Ray cluster and follow its log"
EXAMPLE = "sceneray submit train jobs/configs/town.yaml run=s3://bucket/runs/town data.store=s3://bucket/stores/town"
NOTES = """\
The log of the job comes to stdout; the exit code is 0 only where the job succeeded. Ctrl-C stops the job (what it
saved stays; a second Ctrl-C leaves at once); --no-wait returns when the job is accepted. Losing the connection stops
nothing."""

PACKAGES = ("sceneray", "jobs", "tune", "serve")
# Verbs that may be submitted, with those of their arguments that name files or folders, and what a user calls them.
SUBMITTABLE: dict[str, dict[str, str]] = {
    "prepare": {"urls": "SOURCE or STORE"},
    "train": {},
    "tune": {},
    "evaluate": {"checkpoint": "CHECKPOINT", "data": "--data"},
    "export": {"checkpoint": "CHECKPOINT", "bundle": "BUNDLE"},
    "predict": {"images": "IMAGE", "bundle": "--bundle", "out": "--out"},
}
SETTINGS = {"train": "sceneray.config:TrainSettings", "tune": "tune.settings:TuneSettings"}
FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
# How a job is stopped. Ray's own SIGTERM handler ends a driver at once, and its 3 s are too short to save anything.
STOP_WAIT_S = 60
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
PATIENCE_S = 60.0  # how long a broken connection is tried again
POLL_S = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Word(str):
    """A word of the command line that can be told from an equal one elsewhere."""

    __slots__ = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = f"{HELP}\n\n{NOTES}"
    parser.add_argument("verb", choices=SUBMITTABLE, help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments, as without submit")
    _own_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb; returns the job's id, status and address."""
    words = take_own_arguments(args)
    address = _checked_address(args.address)
    command, files = compose(args.verb, words, lambda what, url: on_cluster(what, url, address))
    client = connect(address)
    environment = forwarded()
    told = ", ".join(sorted(environment.keys() - STOPPING.keys())) or "none"
    say(f"submitting to {address}; variables passed on: {told}")
    with tempfile.TemporaryDirectory(prefix="sceneray-job-") as folder:
        # Always a folder of its own: `python -m` would otherwise import from wherever Ray was started.
        for name, text in {"command.txt": shlex.join(command) + "\n", **files}.items():
            Path(folder, name).write_text(text)
        job: str = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "jobs", *command]),
            submission_id=f"sceneray-{args.verb}-{secrets.token_hex(4)}",
            runtime_env=runtime_env(folder, environment),
        )
    say(f"job {job} accepted")
    if not args.wait:
        say(f"follow it: ray job logs --follow {job} --address {address}")
        print(job)
        return {"job": job, "status": "SUBMITTED", "address": address}
    return follow_to_end(client, job, address)


def compose(verb: str, words: list[str], place: Callable[[str, str], str]) -> tuple[list[str], dict[str, str]]:
    """The verb's command line on the cluster, and the files (name → text) it needs in its folder.

    `place(what, url)` gives each file or folder the name it has there. Settings are checked and resolved here.
    """
    module = importlib.import_module(VERBS[verb])
    parser = argparse.ArgumentParser(prog=f"sceneray {verb}", allow_abbrev=False)
    module.add_arguments(parser)
    marked: list[str] = [Word(part) for word in words for part in _split_option(word)]
    args = parser.parse_intermixed_args(marked)
    if verb not in SETTINGS:
        files = [(label, url) for name, label in SUBMITTABLE[verb].items() for url in _listed(getattr(args, name))]
        new = {id(url): place(label, url) for label, url in files}
        return [verb, *(new.get(id(word), str(word)) for word in marked)], {}
    dropped = {id(word) for word in args.overrides}
    kept = ["settings.yaml" if word is args.config else str(word) for word in marked if id(word) not in dropped]
    return [verb, *kept], {"settings.yaml": _resolved(verb, args, place)}


def on_cluster(what: str, url: str, address: str) -> str:
    """`url` as the cluster at `address` can open it.

    Raises ConfigError for a path on this machine where the cluster is another one.
    """
    if "://" in url or what.endswith("data.cache"):  # the cache is a folder on each node
        return url
    if urlsplit(address).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"{what} is '{url}', a path on this machine, and the cluster at {address} cannot see this machine's disk. "
            "Give a URL that its nodes can open, such as s3://bucket/key, or file:///path for a disk they all mount."
        )
    path = storage.absolute(url)
    say(f"{what}: {path}, on the machine of the cluster's head (through a tunnel that is not this one)")
    return path


def forwarded() -> dict[str, str]:
    """The environment variables a job gets from here."""
    from sceneray.environment import COMMIT_VARIABLE, code_version

    found = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    code = code_version()
    if code["commit"]:
        found[COMMIT_VARIABLE] = code["commit"] + (" dirty" if code["dirty"] else "")
    return found | STOPPING


def runtime_env(folder: str, environment: dict[str, str]) -> dict[str, Any]:
    """What a job takes along: this code, the files in `folder` (its working directory), and `environment`."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    folders = {name: spec.submodule_search_locations for name, spec in specs.items() if spec is not None}
    return {
        "working_dir": folder,
        "py_modules": [str(Path((folders[name] or [])[0]).resolve()) for name in PACKAGES],
        "excludes": ["__pycache__", "*.pyc"],
        "env_vars": environment,
    }


def _own_arguments(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    parser.add_argument("--address", default=default, help=f"the cluster's dashboard (default: {default})")
    parser.add_argument("--no-wait", dest="wait", action="store_false", help="return when the job is accepted")


def take_own_arguments(args: argparse.Namespace) -> list[str]:
    """Take submit's own options out of the words after the verb, wherever they stand; returns the verb's words."""
    parser = argparse.ArgumentParser(prog="sceneray submit", add_help=False, allow_abbrev=False)
    _own_arguments(parser)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--debug", action="store_true")
    return parser.parse_known_args(args.arguments, args)[1]


def _checked_address(address: str) -> str:
    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError(
            f"--address is that of the cluster's dashboard, such as http://127.0.0.1:8265; got '{address}'."
        )
    return address.rstrip("/")


def _split_option(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if word.startswith("--") and equals else [word]


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _resolved(verb: str, args: argparse.Namespace, place: Callable[[str, str], str]) -> str:
    """The settings of train or tune as YAML, with every file placed."""
    module, name = SETTINGS[verb].split(":")
    settings = config.load(getattr(importlib.import_module(module), name), args.config, args.overrides)
    if verb == "train":
        return config.dump(config.map_files(settings, place))
    from tune.settings import plan

    plan(settings)  # a space that training would refuse is refused here
    train = config.map_files(settings.train, lambda key, url: place(f"train.{key}", url))
    return config.dump(settings.model_copy(update={"sweep": place("sweep", settings.sweep), "train": train}))


def connect(address: str) -> Any:
    """A client of the job server at `address`. Raises ScenerayError where it does not answer or wants a token."""
    token_file = Path("~/.ray/auth_token").expanduser()
    if "RAY_AUTH_MODE" not in os.environ and (
        {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or token_file.is_file()
    ):
        # Before the first import of ray, which reads it once. The job client, unlike ray.init, does not look by itself.
        os.environ["RAY_AUTH_MODE"] = "token"
    # A RAY_ADDRESS in the environment would win over the address given here.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # They tell of each package and of the end of the stream; what a user must know is said here.
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ScenerayError(
            f"{address} asks for a token, and there is none here or another one. Put the cluster's token into "
            "~/.ray/auth_token or RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token."
        ) from error
    except (OSError, RuntimeError) as error:
        raise ScenerayError(
            f"no job server answers at {address}: {error} Is the cluster up, and the tunnel to it (ray dashboard "
            "cluster.yaml)?"
        ) from error


def follow_to_end(client: Any, job: str, address: str) -> dict[str, Any]:
    """Show the job's log until it ends. Raises ScenerayError where it did not succeed, Interrupted after Ctrl-C."""
    log = Log(client, job, address)
    try:
        status = asyncio.run(log.follow())
    except KeyboardInterrupt:
        say(f"stopping job {job}, which may take {STOP_WAIT_S} s to save; Ctrl-C again leaves at once")
        client.stop_job(job)
        asyncio.run(log.follow())
        raise Interrupted(f"job {job} is stopped. What it saved stays; the same command goes on from there.") from None
    if status != "SUCCEEDED":
        raise ScenerayError(f"job {job} ended as {status}: its log above says why.")
    say(f"job {job} succeeded")
    return {"job": job, "status": status, "address": address}


class Log:
    """The log of a job, shown on stdout as it grows."""

    def __init__(self, client: Any, job: str, address: str) -> None:
        self.client = client
        self.job = job
        self.address = address
        self.shown = 0  # characters

    async def follow(self) -> str:
        """Show what is new until the job ends, over broken connections too; returns its status."""
        import aiohttp

        lost_at: float | None = None
        while True:
            try:
                await self._read_stream()
                status = str(self.client.get_job_status(self.job))
                if status in ENDED:
                    return status
                lost_at = None
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > PATIENCE_S:
                    raise ScenerayError(
                        f"the connection to {self.address} is lost: {error}. Job {self.job} goes on there; see it "
                        f"with: ray job logs --follow {self.job} --address {self.address}"
                    ) from error
            await asyncio.sleep(POLL_S)

    async def _read_stream(self) -> None:
        skip = self.shown  # a new connection sends the log from its start
        async for text in self.client.tail_job_logs(self.job):
            new = text[skip:]
            skip = max(0, skip - len(text))
            print(new, end="", flush=True)
            self.shown += len(new)


if __name__ == "__main__":
    raise SystemExit(main_of("submit"))
