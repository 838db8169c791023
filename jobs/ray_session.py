"""Ray for one verb: the cluster it was pointed at, else a private local one that ends with it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psutil

from jobs.cli import DEBUG_VARIABLE, say
from sceneray.errors import ScenerayError

API_SERVER = "RAY_API_SERVER_ADDRESS"
END_TIMEOUT_S = 20.0


@contextlib.contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Connect to `address` (or RAY_ADDRESS), else start a private Ray on free loopback ports.

    A private Ray is protected by a token of its own, shares nothing with another command on this machine, and ends
    with this context. `cpus` is how many it says it has. Nested use joins the session that is already there.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    _set_environment(private=address is None)
    import ray

    if ray.is_initialized():
        yield
        return
    options, server = _private_options(cpus) if address is None else ({"address": address}, None)
    others = set(_children())
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # Progress and errors come back as values; Ray's own lines and its workers' are for who debugs.
        ray.init(**options, log_to_driver=bool(os.environ.get(DEBUG_VARIABLE)), logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = address or "a private local Ray"
        raise ScenerayError(f"cannot reach {where}: {error}. Check --address, RAY_AUTH_MODE and the token.") from error
    if threading.current_thread() is threading.main_thread():
        # ray.init puts a handler of its own there, which prints a stack trace and ends the process half-way.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        started = set(_children()) - others
        ray.shutdown()
        _end(started)
        if server is not None:
            os.environ.pop(API_SERVER, None)


def _children() -> list[psutil.Process]:
    """Every process below this one."""
    return psutil.Process().children(recursive=True)


def _end(processes: set[psutil.Process]) -> None:
    """Wait until `processes` are gone; kill what still stands after a while.

    ray.shutdown() returns while its workers are only about to notice that their raylet went.
    """
    _, alive = psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)


def _set_environment(private: bool) -> None:
    """What Ray and the processes it starts read from the environment; before the first import of ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # a worker's printed line once, not twice
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's next default, which it warns of
    if private and "RAY_AUTH_MODE" not in os.environ:
        # A token in the environment protects this Ray and leaves ~/.ray alone.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _private_options(cpus: int | None) -> tuple[dict[str, Any], str]:
    """Arguments of ray.init for a local Ray of our own, and the address of its API server."""
    say("starting a private Ray on this machine ...")
    port = _free_port()
    server = f"http://127.0.0.1:{port}"
    # Where two Rays run on a machine, actors that ask the API server must be told which one is theirs.
    os.environ[API_SERVER] = server
    options = {
        "address": "local",
        "num_cpus": cpus,
        # Ray Train cleans up after a lost controller through the dashboard's API.
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
    }
    return options, server


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port
