"""Ray for one verb: the cluster it was pointed at, else a private local one that ends with it."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator

from jobs.cli import say
from sceneray.errors import ScenerayError


@contextlib.contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Connect to `address` (or RAY_ADDRESS), else start a private Ray on free loopback ports.

    A private Ray is protected by a token of its own, shares nothing with another command on this machine, and ends
    with this context. Nested use joins the session that is already there.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    # Usage statistics off; a worker's printed lines reach the driver once; no colours in logs; no start-up hints.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    private = address is None
    if private and "RAY_AUTH_MODE" not in os.environ:
        # Before the first import of ray: it reads the mode once. A token in the environment leaves ~/.ray alone.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if private:
            say("starting a private Ray on this machine ...")
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=_free_port(),
                log_to_driver=True,
                logging_level="warning",
            )
        else:
            ray.init(address=address, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or "a private local Ray"
        raise ScenerayError(f"cannot reach {where}: {error}. Check --address, RAY_AUTH_MODE and the token.") from error
    try:
        yield
    finally:
        ray.shutdown()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port
