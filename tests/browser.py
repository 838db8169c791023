"""Debian's Chromium, headless, and the endpoint's page in it as somebody uses it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.support import POLL_S

NO_CHROMIUM = "chromium and chromedriver are not installed"
PATIENCE_S = 60
DESKTOP = {"width": 1280, "height": 820, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}

Value = TypeVar("Value")


def until(condition: Callable[[], Value]) -> Value:
    """The first true value of `condition`, looked at again and again for PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(POLL_S)
    return value


@contextlib.contextmanager
def chromium(profile: Path, downloads: Path) -> Iterator[Chrome]:
    """A browser with an empty profile that saves to `downloads`, until the context ends. Skips where there is none."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip(NO_CHROMIUM)
    options = ChromeOptions()
    options.binary_location = str(programs[0])
    # Nothing but the server under test is asked for anything; /dev/shm is small in a container.
    off = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    arguments = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    for argument in [*arguments, f"--user-data-dir={profile}"]:
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Named, or Selenium would look for a driver elsewhere.
    browser = Chrome(options=options, service=Service(str(programs[1])))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """The endpoint's page."""

    def __init__(self, browser: Chrome, downloads: Path) -> None:
        self.browser = browser
        self._downloads = downloads

    def open(self, url: str, screen: dict[str, Any] = DESKTOP, scheme: str = "light") -> None:
        """Open it anew on a screen of that size, for eyes that prefer light or dark."""
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        prefers = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", prefers)
        self.browser.get(url)
        until(lambda: self.find("model").text or self.shows("key") or self.shows("failure"))

    def find(self, name: str) -> WebElement:
        """The element of that id."""
        return self.browser.find_element(By.ID, name)

    def shows(self, name: str) -> bool:
        """Whether the element of that id is to be seen."""
        return self.find(name).is_displayed()

    def run(self, code: str, *arguments: Any) -> Any:
        """What `code` returns in the page; where that is a promise, what it becomes."""
        return self.browser.execute_script(code, *arguments)

    def style(self, name: str, property_: str) -> str:
        """A computed style of the element of that id."""
        return self.find(name).value_of_css_property(property_)

    @property
    def state(self) -> str:
        """empty, busy or done."""
        return self.browser.find_element(By.TAG_NAME, "body").get_attribute("data-state") or ""

    @property
    def spoken(self) -> str:
        """What a screen reader was last told."""
        return str(self.run("return document.getElementById('spoken').textContent"))

    def choose(self, file: Path) -> None:
        """Pick a file, and wait for the end of its request."""
        self.run("document.getElementById('spoken').textContent = ''")
        self.find("file").send_keys(str(file))
        until(lambda: self.spoken and self.state != "busy")

    def colours(self) -> np.ndarray[Any, Any]:
        """The pixels of the mask's canvas: uint8 [H, W, 4], RGBA."""
        height, width, values = self.run("""
            const canvas = document.getElementById("mask");
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, Array.from(data)];
        """)
        return np.array(values, np.uint8).reshape(height, width, 4)

    def legend(self) -> list[tuple[str, str]]:
        """The rows of the legend: name and share."""
        rows = self.find("legend").find_elements(By.TAG_NAME, "button")
        return [
            (row.find_element(By.CLASS_NAME, "name").text, row.find_element(By.CLASS_NAME, "share").text)
            for row in rows
        ]

    def show_layer(self, name: str) -> None:
        """Press Photo, Overlay or Mask."""
        self.find("layers").find_element(By.XPATH, f".//span[text()='{name}']").click()

    def set_opacity(self, percent: int) -> None:
        """Move the slider with the arrow keys."""
        slider = self.find("opacity")
        for _ in range(100):
            distance = percent - int(slider.get_attribute("value") or 0)
            if not distance:
                return
            slider.send_keys(Keys.ARROW_RIGHT if distance > 0 else Keys.ARROW_LEFT)
        raise AssertionError("the slider does not arrive")

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a point of the picture, in parts of its size."""
        mask = self.find("mask")
        across, down = int((x - 0.5) * mask.rect["width"]), int((y - 0.5) * mask.rect["height"])
        ActionChains(self.browser).move_to_element_with_offset(mask, across, down).perform()

    def download(self, button: str) -> tuple[str, bytes]:
        """Press one of the buttons that save; the name and the bytes of the file."""
        before = self._saved()
        self.find(button).click()
        (file,) = until(lambda: self._saved() - before)
        return file.name, file.read_bytes()

    def _saved(self) -> set[Path]:
        """The files that are whole."""
        files = self._downloads.iterdir()
        return {path for path in files if path.suffix != ".crdownload" and not path.name.startswith(".")}
