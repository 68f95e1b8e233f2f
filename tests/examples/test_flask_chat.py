"""examples/flask_chat: over HTTP, and in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from serving import ANSWER, needs, served, stops_clean
from support.gunicorn import Gunicorn
from support.waiting import wait_until

pytestmark = needs("flask")

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"
)


ENDLESS = {"CHAT_WORDS": "1000000"}  # so that a generation runs until something ends it


def running(gunicorn: Gunicorn) -> list[str]:
    return gunicorn.get("/running", timeout=ANSWER).json()


def text_of(events: str) -> str:
    data = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    return "".join(json.loads(event).get("token", "") for event in data)


def test_users_get_their_own_text() -> None:
    with served("flask_chat", env={"CHAT_PACE": "0.005"}) as gunicorn:
        users = [f"user{number}" for number in range(8)]
        paths = [f"/chat?user={user}&prompt=rabbit" for user in users]
        answers = gunicorn.get_many(paths, timeout=ANSWER)
        assert {answer.headers["content-type"] for answer in answers} == {"text/event-stream; charset=utf-8"}
        assert all(answer.text.endswith("event: done\ndata: {}\n\n") for answer in answers)
        texts = [text_of(answer.text) for answer in answers]
        assert all(text.startswith("Rabbit") and len(text) > 40 for text in texts)
        assert len(set(texts)) > 4
        # The text depends on user and prompt alone: asked alone, each gets the same again.
        assert text_of(gunicorn.get(paths[3], timeout=ANSWER).text) == texts[3]
        assert running(gunicorn) == []
        assert gunicorn.get("/chat?prompt=", timeout=ANSWER).status == 400
        stops_clean(gunicorn)


def test_hanging_up_ends_a_generation() -> None:
    with served("flask_chat", env=ENDLESS) as gunicorn:
        with gunicorn.open("/chat?user=leaver&prompt=rabbit", timeout=ANSWER) as stream:
            assert next(iter(stream)).startswith('data: {"worker"')
            assert running(gunicorn) == ["leaver"]
        wait_until(lambda: running(gunicorn) == [], ANSWER, "the generation to end", gunicorn.evidence)
        stops_clean(gunicorn)


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from selenium import webdriver

    monkeypatch.setenv("HOME", str(tmp_path))  # the browser writes there
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        "--headless=new",
        "--no-sandbox",  # root has none
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--window-size=900,720",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.set_page_load_timeout(ANSWER)
        driver.set_script_timeout(ANSWER)
        yield driver
    finally:
        driver.quit()


@needs_browser
@needs("selenium")
def test_two_tabs_see_their_own_tokens_and_closing_one_ends_its_generation(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def open_tab(user: str) -> str:
        browser.switch_to.new_window("tab")
        browser.get(f"http://127.0.0.1:{gunicorn.port}/?user={user}")
        return browser.current_window_handle

    def send(prompt: str) -> None:
        browser.find_element(By.NAME, "prompt").send_keys(prompt, Keys.ENTER)

    def answers() -> list[str]:
        return [bubble.text for bubble in browser.find_elements(By.CSS_SELECTOR, ".model")]

    def expected(user: str, prompt: str) -> str:
        """The first words of that text, asked for without a browser."""
        events = ""
        with gunicorn.open(f"/chat?user={user}&prompt={quote(prompt)}", timeout=ANSWER) as stream:
            while len(text_of(events)) < 30:
                events += next(iter(stream)) + "\n"
        return text_of(events)

    def shown(user: str, prompt: str, characters: int) -> None:
        wanted = expected(user, prompt)
        wait_until(lambda: len(answers()[-1]) > characters, ANSWER, f"{user}'s text", gunicorn.evidence)
        assert answers()[-1].startswith(wanted)

    with served("flask_chat", env=ENDLESS) as gunicorn:
        start_tab = browser.current_window_handle
        ben = open_tab("Ben")
        send("what is in the bottle?")
        shown("Ben", "what is in the bottle?", 40)
        ada = open_tab("Ada")
        send("where did the rabbit go?")
        shown("Ada", "where did the rabbit go?", 40)
        assert answers()[0].startswith("Rabbit")
        browser.find_element(By.TAG_NAME, "button").click()  # Stop
        wait_until(lambda: running(gunicorn) == ["Ben"], ANSWER, "Ada's to end", gunicorn.evidence)

        send("tell me of a golden key")
        shown("Ada", "tell me of a golden key", 160)
        label = browser.find_element(By.ID, "running")
        wait_until(lambda: label.text == "writing for Ada, Ben", ANSWER, "the page to show both")
        picture = Path(os.environ.get("SCREENSHOT") or tmp_path / "flask_chat.png")
        assert browser.save_screenshot(str(picture)) and picture.stat().st_size > 10_000

        browser.switch_to.window(ben)
        assert running(gunicorn) == ["Ada", "Ben"]
        assert answers()[0].startswith("Bottle") and len(answers()) == 1
        browser.close()
        wait_until(lambda: running(gunicorn) == ["Ada"], ANSWER, "Ben's to end", gunicorn.evidence)
        browser.switch_to.window(ada)
        before = len(answers()[1])
        wait_until(lambda: len(answers()[1]) > before, ANSWER, "Ada's to go on", gunicorn.evidence)
        browser.close()
        wait_until(lambda: running(gunicorn) == [], ANSWER, "Ada's to end", gunicorn.evidence)
        browser.switch_to.window(start_tab)
        stops_clean(gunicorn)
