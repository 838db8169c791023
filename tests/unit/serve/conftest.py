"""What tests of the endpoint's protocol share: the model whose answers are known, behind an app without keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve.api import ApiSettings, create_app
from serve.segmenter import Segmenter
from tests.bundles import write_bundle
from tests.unit.serve.tensors import LIMITS, UPLOADS
from tests.unit.serve.uploads import Client


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle whose answers are known."""
    return write_bundle(str(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def segmenter(bundle: str) -> Segmenter:
    """The real thing, in this process."""
    return Segmenter.load(bundle, LIMITS, "cpu")


@pytest.fixture(scope="module")
def client(segmenter: Segmenter) -> Iterator[Client]:
    """A client without a network of an app without keys."""
    with Client(create_app(segmenter, ApiSettings(UPLOADS))) as client:
        yield client
