"""The report as people see it: in a real browser, from disk and inside the MLflow UI."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import influence_pages as made
import matplotlib.image
import numpy as np
import pytest
from chromium import Browser, chromium, missing
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from tiny import tiny_config

import tracked_replay as tr
from tracked_replay.report import Prediction, influence_page
from tracked_replay.tracking import ui_path

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing() or "–"), pytest.mark.browser]

HOSTILE = "\"'><img src=x onerror=\"document.title='changed'\"><script>document.title='changed'</script>"
SCREENSHOTS = "TRACKED_REPLAY_SCREENSHOTS"  # folder that keeps the pictures, for people to look at
PANELS = "return [...document.querySelectorAll('.target')].filter((one) => one.checkVisibility()).map((one) => one.id)"
SELECTED = "return [...document.querySelectorAll('[aria-selected=true]')].map((one) => one.hash)"
TRUST_IS_SEEN = """
const place = document.getElementById('trust').getBoundingClientRect();
return place.top >= 0 && place.bottom <= innerHeight && document.activeElement.id === 'trust';
"""
PICTURES = """
const done = arguments[0];
const sources = [...document.querySelectorAll('.picture')].map((one) => getComputedStyle(one).backgroundImage);
Promise.all(sources.map((source) => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve(image.naturalWidth);
  image.onerror = () => resolve(0);
  image.src = source.slice(5, -2);
}))).then(done);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a page on disk with three targets, one of hostile labels, and a validation."""
    targets = [
        made.target(21, shown=8, retrained=made.retrained()),
        made.target(3, label=HOSTILE, prediction=Prediction(HOSTILE, False, 0.5), retrained=made.retrained()),
        made.mean_target(retrained=made.retrained()),
    ]
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(influence_page(made.page(targets=targets, validation=made.validation())), encoding="utf-8")
    return path.as_uri()


def test_it_opens_from_disk_without_a_word_on_the_console_and_fetches_nothing(browser: Browser, page: str) -> None:
    browser.open(page)
    widths = browser.driver.execute_async_script(PICTURES)
    assert len(widths) > 30
    assert set(widths) == {8}
    assert browser.console() == []
    asked = [request.url for request in browser.requests() if not request.url.startswith("data:")]
    assert asked == [page]


def test_text_from_outside_runs_nothing(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.driver.title == "Influence on Animals"
    assert browser.run("return [document.scripts.length, document.images.length]") == [1, 0]
    assert "<img src=x" in browser.run("return document.getElementById('name-3').textContent")


def test_no_script_but_its_own_can_run(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run(
        "const script = document.createElement('script'); script.textContent = 'document.title = \"changed\"';"
        "document.body.append(script)"
    )
    assert browser.driver.title == "Influence on Animals"
    assert any("Content Security Policy" in message for message in browser.console())


def test_a_target_is_picked_with_the_mouse(browser: Browser, page: str) -> None:
    browser.look(1440)
    browser.open(page)
    assert browser.run(PANELS) == ["target-21"]
    for key in ("combination-1", "3", "21"):
        browser.driver.find_element(By.ID, f"tab-{key}").click()
        assert browser.run(PANELS) == [f"target-{key}"]
        assert browser.run(SELECTED) == [f"#target-{key}"]
        assert browser.run("return location.hash") == f"#target-{key}"


def test_a_target_is_picked_with_the_keyboard(browser: Browser, page: str) -> None:
    browser.look(1440)
    browser.open(page)
    tab_to(browser, "tab-21")
    for key, expected in (
        (Keys.ARROW_RIGHT, "3"),
        (Keys.ARROW_DOWN, "combination-1"),
        (Keys.ARROW_RIGHT, "21"),
        (Keys.ARROW_LEFT, "combination-1"),
        (Keys.ARROW_UP, "3"),
        (Keys.HOME, "21"),
        (Keys.END, "combination-1"),
    ):
        press(browser, key)
        assert browser.run(PANELS) == [f"target-{expected}"]
        assert browser.run("return document.activeElement.id") == f"tab-{expected}"
    style = browser.run(
        "const style = getComputedStyle(document.activeElement); return [style.outlineStyle, style.outlineWidth]"
    )
    assert style == ["solid", "3px"]
    press(browser, Keys.TAB)
    assert browser.run("return document.activeElement.id") == "target-combination-1"


def press(browser: Browser, key: str) -> None:
    ActionChains(browser.driver).send_keys(key).perform()


def tab_to(browser: Browser, element: str) -> None:
    """Press the tab key until an element has the focus, as a person without a mouse would."""
    for _ in range(12):
        press(browser, Keys.TAB)
        if browser.run("return document.activeElement.id") == element:
            return
    raise AssertionError(f"{element} is not reached with the tab key")


def test_a_link_with_a_hash_picks_its_target(browser: Browser, page: str) -> None:
    browser.open(f"{page}#target-3")
    assert browser.run(PANELS) == ["target-3"]
    browser.run("location.hash = '#target-combination-1'")
    WebDriverWait(browser.driver, 10).until(lambda _: browser.run(PANELS) == ["target-combination-1"])
    browser.open(f"{page}#trust")
    assert browser.run(PANELS) == ["target-21"]


def test_the_reasons_are_one_click_away(browser: Browser, page: str) -> None:
    browser.look(800, height=500)
    browser.open(page)
    assert not browser.run(TRUST_IS_SEEN)
    browser.driver.find_element(By.LINK_TEXT, "Why").click()
    assert browser.run(TRUST_IS_SEEN)


def test_assistive_technology_finds_tabs_panels_and_named_pictures(browser: Browser, page: str) -> None:
    browser.open(page)
    nodes = [node for node in browser.command("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    assert sum(role == "tab" for role, _ in roles) == 3
    assert [name for role, name in roles if role == "tabpanel"] == ["Evaluation example 21: cat"]
    pictures = [name for role, name in roles if role in ("image", "img")]
    assert len(pictures) == 1 + 16 + 3
    assert all(pictures)
    assert sum("training example" in name and name.endswith(": helps") for name in pictures) == 8


def test_without_scripts_every_target_can_be_read(browser: Browser, page: str) -> None:
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.run(PANELS) == ["target-21", "target-3", "target-combination-1"]
        assert browser.run("return document.querySelectorAll('[role=tab]').length") == 0
        assert browser.run("return document.querySelector('.unscripted').checkVisibility()")
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_every_target_is_printed(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.command("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.run(PANELS) == ["target-21", "target-3", "target-combination-1"]
    finally:
        browser.command("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 800, 400])
def test_it_fits_the_window_and_takes_the_colours_that_are_preferred(
    browser: Browser, page: str, width: int, scheme: str
) -> None:
    browser.look(width, scheme)
    browser.open(page)
    for tab in browser.driver.find_elements(By.CSS_SELECTOR, "#targets a"):
        tab.click()
        assert browser.run("return document.documentElement.scrollWidth") <= width
    picture = browser.screenshot()
    if SCREENSHOTS in os.environ:
        (Path(os.environ[SCREENSHOTS]) / f"report-{width}-{scheme}.png").write_bytes(picture)
    pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")[:, :, :3]
    assert pixels.shape[1] == width
    assert (float(np.median(pixels)) > 0.5) == (scheme == "light")


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """An MLflow server over the store of a folder."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    store = f"sqlite:///{folder}/mlflow.db"
    command = ["mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--workers", "1"],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, folder / "server.log")
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too; there is nothing to be kept
            process.wait(60)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - our own server
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


def _settled_frame(browser: Browser, wait: WebDriverWait[Chrome]) -> WebElement:
    """The frame that shows an artifact; the UI makes it anew whenever it draws itself."""
    seen: list[str | None] = []

    def settled(driver: Chrome) -> WebElement | None:
        frame = driver.find_element(By.CSS_SELECTOR, "iframe.mlflow-html-iframe")
        seen.append(frame.get_attribute("src"))
        return frame if seen[-6:] == [seen[-1]] * 6 else None  # three seconds

    found: WebElement = wait.until(settled)
    return found


@pytest.mark.slow
def test_the_mlflow_ui_shows_the_page_in_its_frame(browser: Browser, store: Path) -> None:
    run_id = tr.magic(config=tiny_config(train__epochs=1), targets="0,3;mean:0-7")
    browser.look(1440)
    with server(store) as url:
        browser.open(f"{url}/{ui_path(run_id)}")
        wait = WebDriverWait(browser.driver, 120, ignored_exceptions=[WebDriverException])
        wait.until(lambda driver: "magic · TinyTask" in driver.find_element(By.TAG_NAME, "body").text)
        # Not MLflow's view of traces and prompts, which is the one it opens in.
        assert "Judges" not in browser.driver.find_element(By.TAG_NAME, "body").text
        link = browser.driver.find_element(By.LINK_TEXT, "open the report")  # before "Show more" is clicked
        browser.open(link.get_attribute("href"))
        frame = _settled_frame(browser, wait)
        assert frame.get_attribute("sandbox") == "allow-scripts"
        if SCREENSHOTS in os.environ:
            browser.driver.save_screenshot(f"{os.environ[SCREENSHOTS]}/report-in-mlflow.png")
        browser.driver.switch_to.frame(frame)
        wait.until(lambda _: browser.run(PANELS) == ["target-0"])
        assert min(browser.driver.execute_async_script(PICTURES)) > 0
        browser.driver.find_element(By.ID, "tab-3").click()
        assert browser.run(PANELS) == ["target-3"]
        press(browser, Keys.ARROW_RIGHT)
        assert browser.run(PANELS) == ["target-combination-1"]
        assert browser.run("return document.querySelectorAll('a[target]').length") == 0
        browser.driver.find_element(By.LINK_TEXT, "Why").click()
        assert browser.run(PANELS) == ["target-combination-1"]
        assert browser.run(TRUST_IS_SEEN)
        inside = browser.run("return location.href.split('#')[0]")
        assert inside.startswith("blob:")
        requests = browser.requests()
        ours = [request.url for request in requests if request.page.split("#")[0] == inside]
        assert any(asked.startswith("data:image/png") for asked in ours)
        assert [asked for asked in ours if not asked.startswith(("data:", inside))] == []
        # What the UI itself logs is about its own files, or about what it asked for outside.
        theirs = tuple(request.url for request in requests if request.page.split("#")[0] != inside)
        assert [message for message in browser.console() if not message.startswith((url, *theirs))] == []
