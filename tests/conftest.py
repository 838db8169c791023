"""Shared by all tests: the folder decides the marker, skips are a checked list, fixtures that several tiers use."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import ROOT, S3, SKIPS, read_skips, seaweed, unexpected_skips

TIERS = ("unit", "ray", "e2e", "cloud")

# Seeded, so that a red run is red again; no deadline, because a shared machine may stall at any moment.
hypothesis.settings.register_profile("sceneray", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("sceneray")

_UNEXPECTED = pytest.StashKey[list[tuple[str, str]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the tier its folder names."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            tier = item.path.relative_to(here).parts[0]
            if tier not in TIERS:
                raise pytest.UsageError(f"{item.path} is in no tier: move it into one of {', '.join(TIERS)}")
            item.add_marker(tier)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session where a test was skipped that skips.txt does not list."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter is not None else []
    skipped = [(report.nodeid, _reason(report)) for report in reports]
    unexpected = unexpected_skips(skipped, read_skips(SKIPS.read_text()))
    session.config.stash[_UNEXPECTED] = unexpected
    if unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which skips were not expected, as the lines that would allow them."""
    unexpected = config.stash.get(_UNEXPECTED, [])
    if unexpected:
        terminalreporter.section("skips that tests/skips.txt does not list: the session fails", red=True)
        for name, reason in unexpected:
            terminalreporter.write_line(f"{name} | {reason}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


@pytest.fixture(scope="session", autouse=True)
def _plain_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see neither the user's cloud account nor a cluster they happen to have named, and leave no shard behind."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_") or name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
                patch.delenv(name)
        # Before anything imports ray, which reads the mode once: the cloud tests do, long before the first session.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # A bucket that is not the test's own must fail at once, not after asking a cloud's metadata service.
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Child processes and Ray's workers run this tree's code, whatever is installed.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "platform"), str(ROOT)]))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server with an empty bucket; s3:// URLs of this process and its children reach it."""
    import s3fs

    with seaweed(tmp_path_factory.mktemp("weed")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # fsspec keeps one file system per set of arguments; an older one would know another endpoint.
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(server.bucket)
        yield server
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty folder, once on each kind of file system."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    server: S3 = request.getfixturevalue("weed_server")
    return server.url(uuid.uuid4().hex)
