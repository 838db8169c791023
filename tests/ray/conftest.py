"""Shared by the tests on Ray: a store that a run of two workers takes several steps through."""

from __future__ import annotations

import pytest

from tests.stores import town_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 24 train and 5 val scenes, to be read only."""
    url = str(tmp_path_factory.mktemp("stores") / "town")
    town_store(url, train=24)
    return url
