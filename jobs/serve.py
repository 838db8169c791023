"""`sceneray serve`: a bundle behind HTTP, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import ipaddress
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.cli import main_of, say
from jobs.ray_session import ray_session
from sceneray.errors import ConfigError, ServingError

if TYPE_CHECKING:
    from serve.settings import ServeArgs

HELP = "serve a bundle over HTTP until Ctrl-C"
EXAMPLE = "sceneray serve bundles/camvid --port 8000"
APP = "sceneray"
KEY_VARIABLE = "SCENERAY_API_KEY"
# Serve's own answer to a late request is a 408 in plain text: ours, a 504, must come first.
TIMEOUT_MARGIN_S = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", help="URL of a bundle written by `sceneray export`")
    parser.add_argument(
        "options", metavar="KEY=VALUE", nargs="*", help="arguments of serve.app:build: max_batch_size=16"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port (default: 8000)")
    parser.add_argument("--replicas", type=int, default=1, help="model replicas (default: 1)")
    parser.add_argument("--address", help="a running Ray cluster; default: RAY_ADDRESS, else a private local Ray")
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine though no key is asked for")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until interrupted; being interrupted is how a server ends, and no failure."""
    options = {"replicas": args.replicas, **_options(args.options)}
    with serving(args.bundle, args.host, args.port, args.address, args.insecure, **options) as url:
        print(f"serving {args.bundle} at {url}  (docs: {url}/docs; stop with Ctrl-C)", flush=True)
        started_at = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
        say("stopping ...")
        seconds = time.monotonic() - started_at
    return {"bundle": args.bundle, "url": url, "served_seconds": round(seconds, 1)}


@contextlib.contextmanager
def serving(
    bundle: str,
    host: str = "127.0.0.1",
    port: int = 0,
    address: str | None = None,
    insecure: bool = False,
    **options: Any,
) -> Iterator[str]:
    """Serve `bundle` while the context lasts; yields the base URL once the model answers.

    `options` are arguments of `serve.app:build`. Port 0 takes a free one. The key in SCENERAY_API_KEY is asked of
    callers, unless `api_keys` names others, beside those of `api_keys_file`; beyond loopback keys are required. Raises
    ServingError where the port is taken or the model does not start, BundleError where the bundle cannot be read,
    ConfigError for a wrong option or key file; all before Ray starts, but for a model that fails on its device.
    """
    from sceneray import bundle as bundles
    from sceneray.devices import usable_cores

    args = _serve_args(bundle, options | _own_key(options))
    _check_door(args, host, insecure)
    port = _claim(host, port)
    bundles.verify(args.bundle)
    if address is None and not os.environ.get("RAY_ADDRESS"):
        # A private Ray: the machine is ours, and Ray would give each replica one thread.
        args = args.model_copy(update=cpu_share(args))
        # glibc keeps a heap for every few threads; with as many threads as Ray has, each grows to the largest images.
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    needed = math.ceil((args.max_replicas or args.replicas) * args.cpus + args.ingress_replicas)
    with contextlib.ExitStack() as stack, ray_session(address, cpus=max(needed, usable_cores())):
        _refuse_running()
        try:
            _start(args, host, port)
            yield f"http://{_in_url(host)}:{port}"
        finally:
            # Until Ray has ended: it prints on stdout that Serve's controller, told to end, has ended.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            _stop()


def cpu_share(args: ServeArgs) -> dict[str, int]:
    """Threads of a pass and passes at a time, as far as they were not given, where all cores are the replicas'.

    Two passes on half the cores each: threads of one pass wait for each other whenever the system takes one's core
    away, and HTTP beside them takes it often. Measured in docs/benchmarks.md.
    """
    from sceneray.devices import cpu_threads

    cores = cpu_threads(args.threads, args.max_replicas or args.replicas)
    if args.gpus or cores < 2 or args.model_fields_set & {"threads", "concurrent_batches"}:
        return {"threads": cores}
    return {"threads": cores // 2, "concurrent_batches": 2}


def _serve_args(bundle: str, options: dict[str, Any]) -> ServeArgs:
    """Checked arguments, and a key file that can be used. Does not import ray."""
    from sceneray import storage
    from sceneray.config import validate
    from serve import keys
    from serve.settings import ServeArgs

    args = validate(ServeArgs, {"bundle": bundle, **options}, "the command line")
    if args.api_keys_file is not None:
        url = storage.absolute(args.api_keys_file)
        keys.read(url)
        args = args.model_copy(update={"api_keys_file": url})
    return args


def _refuse_running() -> None:
    """One Serve has one address, and ending ours would end somebody's."""
    from ray import serve

    if serve.status().proxies:
        raise ServingError(
            "Serve runs on this cluster already, on a host and port of its own. Add the model to it with "
            "`serve deploy` (see serve/config.yaml), or stop it first: `serve shutdown`."
        )


def _start(args: ServeArgs, host: str, port: int) -> None:
    from ray import serve

    from serve.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    say("starting the model ...")
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    http = {"host": host, "port": port, "request_timeout_s": args.deadline_s + TIMEOUT_MARGIN_S}
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
    try:
        serve.run(build(args), name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise ServingError(f"the model does not start: {_reason(error)}") from error


def _stop() -> None:
    from ray import serve

    serve.shutdown()


def _reason(error: RuntimeError) -> str:
    """What the failed replica raised: the last line of its traceback, which Serve keeps in the deployment's status."""
    from ray import serve

    for deployment in serve.status().applications[APP].deployments.values():
        lines = [line.strip() for line in str(deployment.message).splitlines()]
        raised = [line for line in lines if line.startswith("sceneray.errors.") or "Error: " in line]
        if raised:
            return raised[-1].removeprefix("sceneray.errors.")
    return str(error)


def _claim(host: str, port: int) -> int:
    """`port`, or a free one for 0, if nobody listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port closed a moment ago is free
        try:
            sock.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ServingError(
                f"cannot listen on {host} port {port}: {why}. Stop what listens there, or choose another --port "
                "(0: any free one)."
            ) from error
        claimed: int = sock.getsockname()[1]
    return claimed


def _own_key(options: dict[str, Any]) -> dict[str, Any]:
    """The key of this shell, unless the options name others."""
    key = os.environ.get(KEY_VARIABLE)
    return {"api_keys": (hashlib.sha256(key.encode()).hexdigest(),)} if key and "api_keys" not in options else {}


def _check_door(args: ServeArgs, host: str, insecure: bool) -> None:
    """Whoever can reach an open endpoint can use it: beyond this machine, keys or the word that none is meant."""
    if not (args.api_keys or args.api_keys_file or insecure or _is_loopback(host)):
        raise ServingError(
            f"{host} can be reached from other machines and no API key is asked for. Set {KEY_VARIABLE}, give "
            "api_keys_file=FILE (`sceneray keys new` writes one), listen on 127.0.0.1, or say --insecure."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"'{pair}' is no option: write key=value, for example max_batch_size=16")
        options[key] = value
    return options


if __name__ == "__main__":
    raise SystemExit(main_of("serve"))
