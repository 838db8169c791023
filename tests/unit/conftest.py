"""Shared by the unit tests: a small store to train on, and an S3 server that can be made to fail."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.stores import town_store
from tests.support import S3

if TYPE_CHECKING:
    from tests.fault_proxy import FaultProxy


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 12 train and 5 val scenes, to be read only."""
    url = str(tmp_path_factory.mktemp("stores") / "town")
    town_store(url)
    return url


@pytest.fixture
def proxy(weed_server: S3) -> Iterator[FaultProxy]:
    """A proxy before the S3 server which passes everything on until it is told otherwise; s3:// URLs go through it."""
    # Imported here: it brings in torch and s3fs, which most unit tests start without.
    from tests.fault_proxy import FaultProxy, at_endpoint

    with FaultProxy(weed_server.endpoint) as between, at_endpoint(between.endpoint):
        yield between


@pytest.fixture
def root(weed_server: S3) -> str:
    """The URL of an empty folder on the S3 server."""
    return weed_server.url(uuid.uuid4().hex)
