"""The page for people: what is served, what it may load, and that it works wherever a proxy puts it.

tests/e2e/test_page.py uses it in a browser.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from sceneray.data import town
from sceneray.data.images import decode_image
from serve.api import ApiSettings, create_app
from serve.routes.page import MEDIA_TYPES, SAMPLE_SEED, SAMPLE_SIZE, drawn_once
from serve.schemas import ErrorBody
from tests.support import ROOT
from tests.unit.serve.uploads import Client

FOLDER = ROOT / "serve" / "page"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}
POLICY = {
    "default-src": ["'none'"],
    "script-src": ["'self'"],
    "style-src": ["'self'"],
    "img-src": ["'self'", "blob:", "data:"],
    "connect-src": ["'self'"],
    "base-uri": ["'none'"],
    "form-action": ["'none'"],
    "frame-ancestors": ["'none'"],
}


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep it."""
        self.found.append((tag, {name: value or "" for name, value in attrs}))


def links() -> set[str]:
    """Every URL that the page's own text names: in its elements, its imports and its requests."""
    found = {
        attrs[name] for _, attrs in Elements(TEXTS["index.html"]).found for name in ("href", "src") if name in attrs
    }
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            found |= {f"page/{module}" for module in re.findall(r'from "\./(.*?)"', text)}
            found |= set(re.findall(r'ask\("(.*?)"', text))
    return found


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of an app that asks for a key: the page itself must come without one."""
    with Client(app(hashlib.sha256(b"open sesame").hexdigest())) as client:
        yield client


def app(*digests: str) -> FastAPI:
    """The endpoint's app without a model: the page needs none until a photo comes."""
    return create_app(None, ApiSettings(key_digests=digests))  # type: ignore[arg-type]


def behind(prefix: str, app: ASGIApp) -> Any:
    """`app` as a server or Serve's proxy calls it whose root_path is `prefix` (ASGI specification, root_path)."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": prefix}, receive, send)

    return outer


def test_the_page_is_at_the_root(client: Client) -> None:
    """/ is the page, as HTML, and asks for no key."""
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == TEXTS["index.html"]


def test_every_file_is_served_with_its_type_and_nothing_else_is(client: Client) -> None:
    """The folder's files, all of them, come as what they are; any other name is a 404 in JSON."""
    assert set(TEXTS) == set(MEDIA_TYPES)
    for name, text in TEXTS.items():
        answer = client.get(f"/page/{name}")
        assert answer.text == text
        assert answer.headers["content-type"].partition(";")[0] == MEDIA_TYPES[name]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("page.py", "..%2fapi.py", "%2e%2e/api.py", "", "index.html/", "sample.png"):
        answer = client.get(f"/page/{name}")
        assert answer.status_code in (307, 404), name
        if answer.status_code == 404:
            assert ErrorBody.model_validate_json(answer.content).error_type == "not_found"


def test_the_policy_allows_the_pages_own_files_alone(client: Client) -> None:
    """The Content-Security-Policy starts from nothing and names each thing that the page needs."""
    for path in ("/", "/page/page.js", "/page/sample.jpg"):
        policy = client.get(path).headers["content-security-policy"]
        assert {name: values for name, *values in map(str.split, policy.split(";"))} == POLICY


def test_the_page_has_no_code_and_no_style_in_its_text() -> None:
    """The policy would drop inline scripts, handlers and styles, so there are none."""
    elements = Elements(TEXTS["index.html"]).found
    assert len(elements) > 30
    assert "style" not in {tag for tag, _ in elements}
    assert all(attrs.get("src") for tag, attrs in elements if tag == "script")
    assert not [attrs for _, attrs in elements if any(name == "style" or name.startswith("on") for name in attrs)]
    assert not re.search(r"\beval\(|new Function|innerHTML|insertAdjacentHTML|document\.write", "".join(TEXTS.values()))


@pytest.mark.parametrize("name", list(TEXTS))
def test_no_file_names_another_server(name: str) -> None:
    """There is no URL of elsewhere in any file; the name of SVG's namespace is no URL that anybody asks for."""
    text = TEXTS[name].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?:|wss?:|(?<!:)//\w|url\((?!#)|@import", text) == []


@pytest.mark.parametrize("prefix", ["", "/town", "/a/b"])
def test_every_link_leads_somewhere_behind_any_prefix(prefix: str) -> None:
    """Resolved against the address of the page, each link and each request is a route; no prefix is configured."""
    with Client(behind(prefix, app())) as client:
        page = f"http://endpoint{prefix}/"
        asked = links()
        assert {"page/page.css", "page/mask.js", "page/sample.jpg", "v1/model", "v1/segment", "docs"} <= asked
        for link in asked - {"v1/model", "v1/segment"}:
            assert client.get(urljoin(page, link)).status_code == 200, link
        assert client.get(urljoin(page, "v1/segment")).status_code == 405
        assert client.request("POST", urljoin(page, "v1/model")).status_code == 405


@pytest.mark.parametrize("prefix", ["/town", "/a/b"])
def test_a_prefix_without_its_slash_leads_to_the_page(prefix: str) -> None:
    """The page's relative links need the slash at the end of its address: without it the browser is sent there."""
    with Client(behind(prefix, app())) as client:
        answer = client.get(prefix)
        assert answer.status_code == 307
        assert answer.headers["location"] == f"http://endpoint{prefix}/"


def test_what_a_browser_has_is_not_sent_again(client: Client) -> None:
    """With the tag of what it has, a browser gets a 304 without a body; with an older one the file."""
    for path in ("/", "/page/page.js", "/page/sample.jpg"):
        first = client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = client.request("GET", path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.request("GET", path, headers={"If-None-Match": '"old"'}).content == first.content


def test_the_sample_is_a_scene_that_no_model_was_trained_on(client: Client) -> None:
    """It is a JPEG of every class of the town, from the seeds that no store draws from, whatever its own seed."""
    answer = client.get("/page/sample.jpg")
    assert answer.headers["content-type"] == "image/jpeg"
    photo, label = town.draw(SAMPLE_SEED, *SAMPLE_SIZE)
    assert np.abs(decode_image(answer.content).astype(int) - photo).mean() < 4
    assert set(np.unique(label)) == {entry.id for entry in town.CLASSES}
    block = SAMPLE_SEED // town.SEEDS_A_SPLIT
    assert block % len(town.SPLIT_SEEDS) == town.SPLIT_SEEDS["held_out"]


def test_the_sample_is_drawn_once() -> None:
    """Many who ask at once get the very same bytes object: nobody's request draws it a second time."""
    sample = drawn_once()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: sample(), range(32)))
    assert len({id(answer) for answer in answers}) == 1
