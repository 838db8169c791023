"""The page for people in a real browser, before a real server with a real model."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from starlette.applications import Starlette
from starlette.routing import Mount

from sceneray.data.images import decode_image, decode_label, encode_jpeg
from sceneray.masks import Mask, colour_table, indexed_png, shares
from sceneray.predictor import Predictor
from serve.api import ApiSettings, create_app
from serve.batching import Limits
from serve.segmenter import Segmenter
from tests.browser import PATIENCE_S, PHONE, Page, chromium, until
from tests.bundles import BRIGHT, CLASSES, DARK, half_bright, write_bundle
from tests.support import free_port

KEY = "open-sesame"
LIMITS = Limits(max_items=4, max_cost=10**6, max_queued_cost=10**7, max_wait_s=0.001)
# Dark, bright, and dark again: of 128 columns 48 are bright, so that the shares differ.
PICTURE = np.concatenate([half_bright(96, 96)[0], np.full((96, 32, 3), 20, np.uint8)], axis=1)
PHOTO = encode_jpeg(PICTURE)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A real bundle's model whose answers are known."""
    return Predictor.load(write_bundle(str(tmp_path_factory.mktemp("bundle"))), "cpu")


@pytest.fixture(scope="module")
def mask(predictor: Predictor) -> Mask:
    """What the predictor says of the photograph, without a server and without a browser."""
    return predictor.predict([decode_image(PHOTO)])[0]


@pytest.fixture(scope="module")
def server(predictor: Predictor) -> Iterator[str]:
    """A real server: the endpoint at its root, again behind the prefix /a/b/, and at /locked/ with a key."""
    segmenter = Segmenter(predictor, LIMITS)
    plain = create_app(segmenter, ApiSettings())
    locked = create_app(segmenter, ApiSettings(key_digests=(hashlib.sha256(KEY.encode()).hexdigest(),)))
    app = Starlette(routes=[Mount("/locked", locked), Mount("/a/b", plain), Mount("/", plain)])
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser saves."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, downloads: Path) -> Iterator[Chrome]:
    """One browser for all tests; each opens the page anew."""
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as browser:
        yield browser


@pytest.fixture
def page(browser: Chrome, server: str, downloads: Path) -> Iterator[Page]:
    """The page. Its console tells of no error by the end of a test, and of nothing that the policy held up."""
    page = Page(browser, downloads)
    page.open(f"{server}/")
    yield page
    told = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [text for text in told if "Failed to load resource" not in text] == []  # an answer 4xx, which tests want


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph's file."""
    path = tmp_path / "street.jpg"
    path.write_bytes(PHOTO)
    return path


def percent(share: float) -> str:
    """A share as the legend writes it."""
    return f"{100 * share:.1f} %"


def test_a_photo_comes_back_with_its_mask(page: Page, photo: Path, mask: Mask) -> None:
    """Each pixel of the mask's canvas has the colour of the predictor's class; legend and times stand beside it."""
    assert page.find("model").text == "brightness · version 7 · 3 classes"
    page.choose(photo)
    assert page.state == "done"
    colours = page.colours()
    assert (colours[..., :3] == colour_table(CLASSES)[mask]).all()
    assert (colours[..., 3] == 255).all()
    assert page.legend() == [(row["name"], percent(row["share"])) for row in shares(mask, CLASSES)]
    assert re.fullmatch(r"[\d.]+ m?s", page.find("total").text)
    stages = page.find("times").text
    assert all(stage in stages for stage in ("network", "header", "decode", "encode"))
    assert page.find("photo-name").text == "street.jpg · 128 × 96"


def test_slider_and_layers_show_photo_mask_or_both(page: Page, photo: Path, mask: Mask) -> None:
    """What is painted on the screen is the photo, the mask, or their blend at the opacity of the slider."""
    page.choose(photo)
    colour, grey = np.array(CLASSES[BRIGHT].color), np.array([230, 230, 230])
    assert mask[48, 72] == BRIGHT

    def painted() -> np.ndarray:
        picture = np.asarray(Image.open(io.BytesIO(page.find("stage").screenshot_as_png)).convert("RGB"), int)
        height, width = picture.shape[:2]
        return picture[height // 2, width * 72 // 128]

    for opacity in (60, 25, 90):
        page.set_opacity(opacity)
        assert painted() == pytest.approx(colour * opacity / 100 + grey * (1 - opacity / 100), abs=4)
        assert page.find("opacity-text").text == f"{opacity} %"
    page.show_layer("Photo")
    assert painted() == pytest.approx(grey, abs=4)
    page.show_layer("Mask")
    assert painted() == pytest.approx(colour, abs=1)
    page.set_opacity(50)
    assert page.find("stage").get_attribute("data-layer") == "overlay"


def test_mouse_and_keys_name_the_class(page: Page, photo: Path) -> None:
    """Pointing names the class and lights its row; so do the arrow keys, aloud too; Escape ends it."""
    page.choose(photo)
    for x, name in ((0.1, "dark"), (0.55, "bright"), (0.95, "dark")):
        page.hover(x, 0.5)
        assert page.find("spot-name").text == name
        assert page.run("return document.querySelector('.lit .name').textContent") == name
    canvas = page.find("mask")
    canvas.send_keys(Keys.ESCAPE)
    assert not page.shows("spot")
    canvas.send_keys(Keys.ARROW_RIGHT)  # starts in the middle
    assert page.find("spot-name").text == "bright"
    canvas.send_keys(*[Keys.ARROW_LEFT] * 12)
    assert page.find("spot-name").text == "dark"
    assert page.spoken == "dark"


def test_a_row_of_the_legend_shows_its_class_alone(page: Page, photo: Path, mask: Mask) -> None:
    """Pressed, it dims the other classes; pressed again, all are back."""
    page.choose(photo)
    row = page.find("legend").find_element("css selector", f"[data-id='{DARK}']")
    row.send_keys(Keys.ENTER)
    assert row.get_attribute("aria-pressed") == "true"
    alpha = page.colours()[..., 3]
    assert (alpha[mask == DARK] == 255).all()
    assert (alpha[mask == BRIGHT] < 60).all()
    row.send_keys(Keys.ENTER)
    assert (page.colours()[..., 3] == 255).all()


def test_what_is_saved_is_what_the_endpoint_says(page: Page, photo: Path, mask: Mask, server: str) -> None:
    """The mask is the endpoint's own PNG, byte by byte; the JSON has its shares; the overlay is the photo's size."""

    def asked(kind: str) -> httpx.Response:
        headers = {"Content-Type": "image/jpeg", "Accept": kind}
        return httpx.post(f"{server}/v1/segment", content=PHOTO, headers=headers, trust_env=False)

    page.choose(photo)
    name, data = page.download("save-mask")
    assert name == "street-mask.png"
    assert data == asked("image/png").content
    assert (decode_label(data) == mask).all()
    name, data = page.download("save-json")
    assert name == "street.json"
    body, theirs = json.loads(data), asked("application/json").json()
    assert {key: body[key] for key in ("width", "height", "classes")} == {
        key: theirs[key] for key in ("width", "height", "classes")
    }
    assert body["model"]["version"] == "7"
    assert body["request_id"] in page.find("request-id").text
    page.set_opacity(50)
    name, data = page.download("save-overlay")
    assert name == "street-overlay.jpg"
    blend = (colour_table(CLASSES)[mask].astype(int) + decode_image(PHOTO)) / 2
    assert np.abs(decode_image(data) - blend).mean() < 3


def test_a_file_that_is_no_photo_is_told_in_a_sentence(page: Page, photo: Path, tmp_path: Path) -> None:
    """The server's sentence stands on the page with the request's id, and the next photo is answered."""
    text = tmp_path / "notes.txt"
    text.write_text("this is no photograph")
    page.choose(text)
    assert page.shows("failure")
    sentence = page.find("failure-text").text
    assert "JPEG, PNG or WebP" in sentence
    assert re.fullmatch(r"[A-Z].*\.", sentence)
    assert re.fullmatch(r"Request [0-9a-f]{32}", page.find("failure-id").text)
    assert not page.shows("again")
    assert not page.shows("facts")
    page.choose(photo)
    assert page.state == "done"
    assert not page.shows("failure")


def test_a_server_that_is_away_can_be_asked_again(page: Page, photo: Path) -> None:
    """Without a network the page says so and offers to try again, which then works."""
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.choose(photo)
    finally:
        page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    assert page.find("failure-text").text == "The server cannot be reached."
    page.find("again").click()
    until(lambda: page.state == "done")


def test_a_key_is_asked_for_and_kept_nowhere(page: Page, photo: Path, server: str) -> None:
    """A server with keys: the page asks for one, tells a wrong one, sends the right one, and stores none."""
    page.open(f"{server}/locked/")
    assert page.shows("key")
    assert not page.shows("failure")
    field = page.find("key-text")
    field.send_keys("wrong", Keys.ENTER)
    until(lambda: page.shows("failure"))
    assert "API key" in page.find("failure-text").text
    page.choose(photo)
    assert page.shows("key")
    field.clear()
    field.send_keys(KEY, Keys.ENTER)
    until(lambda: page.state == "done")
    assert not page.shows("key")
    assert page.run("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.open(f"{server}/locked/")
    assert page.shows("key")


def test_the_page_works_behind_a_prefix(page: Page, server: str) -> None:
    """Behind /a/b/ the sample is fetched and segmented."""
    page.open(f"{server}/a/b/")
    page.find("sample").click()
    until(lambda: page.state == "done")
    assert page.find("photo-name").text == "sample.jpg · 512 × 384"
    assert sum(float(share.removesuffix(" %")) for _, share in page.legend()) == pytest.approx(100, abs=0.2)


def test_a_dropped_photo_is_taken(page: Page, mask: Mask) -> None:
    """A file that is let go over the page is segmented as a chosen one."""
    page.run(
        """
        const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(arguments[0])], "dropped.jpg"));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
        """,
        list(PHOTO),
    )
    until(lambda: page.state == "done")
    assert (page.colours()[..., :3] == colour_table(CLASSES)[mask]).all()


def test_a_photo_on_its_side_stands_upright_under_its_mask(page: Page, tmp_path: Path) -> None:
    """The browser turns the photo as its EXIF says, and so does the server: both layers have the same shape."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "sideways.jpg"
    Image.fromarray(PICTURE).save(path, exif=exif)
    page.choose(path)
    assert page.colours().shape == (128, 96, 4)
    assert page.run("const p = document.getElementById('photo'); return [p.naturalHeight, p.naturalWidth]") == [128, 96]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(
    page: Page, server: str, photo: Path, tmp_path: Path, scheme: str
) -> None:
    """On 390 × 844 pixels, empty, with an error and with a result, nothing is wider than the screen."""

    def widths() -> list[int]:
        return page.run("return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")

    page.open(f"{server}/", PHONE, scheme)
    assert widths() == [390, 390, 390]
    assert page.find("sample").size["height"] < 80  # a button, whatever the room around it
    text = tmp_path / ("a-name-without-any-place-to-break-" * 4 + ".txt")
    text.write_text("this is no photograph")
    page.choose(text)
    assert widths() == [390, 390, 390]
    page.choose(photo.rename(tmp_path / ("a-name-without-any-place-to-break-" * 4 + ".jpg")))
    assert page.state == "done"
    assert widths() == [390, 390, 390]
    assert page.find("stage").size["width"] > 300
    ground = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(ground) < 60 if scheme == "dark" else min(ground) > 200


def filtered(mask: Mask, kind: int) -> bytes:
    """`mask` as a palette PNG whose rows all have filter `kind` (PNG specification, 9.2), under the server's header."""
    wide = np.pad(mask.astype(int), ((1, 0), (1, 0)))
    left, up, corner = wide[1:, :-1], wide[:-1, 1:], wide[:-1, :-1]
    distances = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner]))
    paeth = np.choose(distances.argmin(0), [left, up, corner])
    guess = [np.zeros_like(left), left, up, (left + up) // 2, paeth][kind]
    rows = np.pad(((mask - guess) % 256).astype(np.uint8), ((0, 0), (1, 0)), constant_values=kind)
    png = indexed_png(mask, CLASSES)
    packed = b"IDAT" + zlib.compress(rows.tobytes())
    end = png.index(b"IDAT") - 4
    return png[:end] + struct.pack(">I", len(packed) - 4) + packed + struct.pack(">I", zlib.crc32(packed)) + png[-12:]


@pytest.mark.parametrize("kind", range(5))
def test_the_page_reads_class_ids_whatever_the_pngs_filter(page: Page, kind: int) -> None:
    """The page's own reader gives the ids of a PNG of each filter, as Pillow does."""
    mask = np.random.default_rng(kind).integers(0, 8, (9, 13), dtype=np.uint8)  # few ids: the ties are decided too
    png = filtered(mask, kind)
    assert (decode_label(png) == mask).all()
    code = """
        return import(new URL("page/mask.js", document.baseURI))
            .then(({ readMask }) => readMask(new Uint8Array(arguments[0])))
            .then(({ width, height, ids }) => [width, height, Array.from(ids)]);
    """
    assert page.run(code, list(png)) == [13, 9, mask.ravel().tolist()]
