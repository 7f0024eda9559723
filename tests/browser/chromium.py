"""A headless Chromium for tests: console, network and emulated media, by way of chromedriver."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # in a container, Chromium's own sandbox may not start
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--no-first-run",
    # Every name outside is unknown, so that whatever is fetched from there fails and is logged.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1440,1000",
    # A frame in a process of its own would keep its requests and its console to itself.
    "--disable-features=IsolateSandboxedIframes",
    "--disable-site-isolation-trials",
)


def missing() -> str:
    """Why no browser can be driven here; empty where one can."""
    if not any(shutil.which(name) for name in BROWSERS):
        return "Chromium is not installed (Debian: apt-get install chromium chromium-driver)"
    return "" if shutil.which("chromedriver") else "chromedriver is not installed (Debian: chromium-driver)"


class Request(NamedTuple):
    """A request that a page made.

    Attributes:
        url: what was asked for.
        page: URL of the document that asked.
    """

    url: str
    page: str


class Browser:
    """A window of a headless Chromium.

    Attributes:
        driver: selenium's.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Open a page anew; what was logged before is forgotten."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")
        self.console()
        self.requests()
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def console(self) -> list[str]:
        """What was written to the console since it was last asked, errors and warnings of the browser among it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[Request]:
        """What was asked for since it was last asked."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            Request(message["params"]["request"]["url"], message["params"]["documentURL"])
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def look(self, width: int, scheme: str = "light", *, height: int = 1000) -> None:
        """Set the window's width, in CSS pixels, and the colour scheme that the reader prefers."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"])

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser and end it."""
    options = ChromeOptions()
    options.binary_location = next(path for name in BROWSERS if (path := shutil.which(name)))
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
