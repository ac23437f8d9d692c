"""The chat page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serval.server.app import create_app
from serval.server.engine import EngineBackend
from serval.server.state import AppOptions
from tests.server.live import LiveServer

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def keyed(model_dir: Path) -> Iterator[LiveServer]:
    """A server that asks for an API key."""
    backend = EngineBackend.load(str(model_dir), cache_bytes=2**20, max_sequences=8)
    options = AppOptions(model_names=("tiny",), api_keys=("sesame",))
    with LiveServer(create_app(backend, options), backend) as live:
        yield live
        live.check_integrity()


def test_page_needs_nothing_from_elsewhere(server: LiveServer) -> None:
    answer = httpx.get(server.url + "/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    text = answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in text
    assert "https://" not in text
    for label in ("aria-live", 'lang="en"', "prefers-color-scheme", "prefers-reduced-motion"):
        assert label in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if DRIVER is None or BROWSER is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def wait(driver: Any, script: str) -> Any:
    """Wait until JavaScript returns something true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 30, poll_frequency=0.05).until(
        lambda d: d.execute_script("return " + script)
    )


def send(driver: Any, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.find_element("id", "prompt").send_keys(text + Keys.ENTER)


LAST = "document.querySelector('.message:last-child')"


def set_value(driver: Any, field: str, value: str) -> None:
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input'));",
        field,
        value,
    )


def test_chat_stop_and_errors(browser: Any, server: LiveServer) -> None:
    browser.get(server.url + "/")
    assert wait(browser, "document.querySelector('.state.up') && model") == "tiny"
    # A whole answer, with live numbers.
    set_value(browser, "max_tokens", "20")
    send(browser, "Which cat jumps the highest?")
    notes = wait(browser, f"{LAST}.querySelector('.foot span')?.textContent")
    assert "tokens" in notes
    assert wait(browser, "document.getElementById('first').textContent").endswith("ms")
    assert "of 256" in wait(browser, "document.getElementById('context-text').textContent")
    assert " % of 1.0 MiB" in wait(browser, "document.getElementById('cache-text').textContent")
    # An answer stopped half-way frees its blocks.
    slow = "serval_sequences_finished_total"
    registry = server.app.state.serval.metrics.registry
    before = registry.get_sample_value(slow, {"reason": "length"})
    set_value(browser, "max_tokens", "")
    browser.execute_script("document.getElementById('new').click()")
    wait(browser, "document.querySelector('.welcome') && true")
    browser.execute_script(
        "document.getElementById('prompt').value = 'Go on'; ask();"
        "setTimeout(() => document.getElementById('form').requestSubmit(), 60);"
    )
    wait(browser, "!controller && document.querySelectorAll('.message').length === 2")
    server.check_integrity()
    text = wait(browser, f"{LAST}.textContent")
    if registry.get_sample_value(slow, {"reason": "length"}) == before:
        assert "stopped" in text or "tokens" in text
    # An error is shown where the answer would be, and can be retried.
    set_value(browser, "max_tokens", "9999")
    send(browser, "Hello")
    assert "context" in wait(browser, f"{LAST}.querySelector('.error span')?.textContent")
    set_value(browser, "max_tokens", "5")
    browser.execute_script(f"{LAST}.querySelector('.error button').click()")
    wait(browser, f"{LAST}.querySelector('.foot span')?.textContent")
    assert not browser.execute_script("return document.querySelectorAll('.error').length")
    # Both themes, and no complaint in the console but the refused request.
    theme = "document.documentElement.dataset.theme"
    first = wait(browser, theme)
    browser.execute_script("document.getElementById('theme').click()")
    assert wait(browser, theme) != first
    logs = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in logs if "status of 400" not in message] == []


def test_api_key_field(browser: Any, keyed: LiveServer) -> None:
    browser.get(keyed.url + "/")
    wait(browser, "document.querySelector('.state.up') && model")
    set_value(browser, "max_tokens", "5")
    send(browser, "Hello")
    assert "API key" in wait(browser, f"{LAST}.querySelector('.error span')?.textContent")
    set_value(browser, "key", "sesame")
    browser.execute_script(f"{LAST}.querySelector('.error button').click()")
    wait(browser, f"{LAST}.querySelector('.foot span')?.textContent")


def test_model_text_is_never_markup(browser: Any, server: LiveServer) -> None:
    browser.get(server.url + "/")
    wait(browser, "model")
    hostile = "<img src=x onerror=window.bad=1>\n```html\n<script>window.bad=1</script>\n```\n`<b>`"
    count = browser.execute_script(
        "const body = document.createElement('div'); document.body.append(body);"
        "render(body, arguments[0]); return body.querySelectorAll('img, script, b').length;",
        hostile,
    )
    assert count == 0
    assert not browser.execute_script("return window.bad")
