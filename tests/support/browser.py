"""A real Chromium, without a window, where this machine has one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Request, Route, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
NO_CHROMIUM = f"the page is driven in a browser, and none of {', '.join(NAMES)} is installed here"


@contextmanager
def started_chromium() -> Iterator[Browser]:
    """It may run as root, as machines that build software do: it is shown this server's pages only."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def answering(json: Any, status: int = 200) -> Callable[[Route], None]:
    """For `page.route`: what is said in the server's place."""
    return lambda route: route.fulfill(json=json, status=status)


def forget(page: Page, url: str) -> None:
    """Takes from the browser whatever a site has left there."""
    session = page.context.new_cdp_session(page)
    session.send("Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"})
    session.detach()


@dataclass
class ChatPage:
    """A person at the page. `complaints`: what the browser said of it: errors, violations of its policy."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # every address that the page asked for
    num_ended: int = 0  # answers that have come to their end
    num_seen: int = 0  # of these, that were waited for

    def __post_init__(self) -> None:
        self.page.set_default_timeout(15_000)
        self._listeners = {
            "console": lambda message: message.type == "error" and self.complaints.append(message.text),
            "pageerror": lambda error: self.complaints.append(str(error)),
            "request": lambda request: self.asked.append(request.url),
            "requestfinished": self._count,
            "requestfailed": self._count,
        }
        for event, listen in self._listeners.items():
            self.page.on(event, listen)

    def close(self) -> None:
        for event, listen in self._listeners.items():
            self.page.remove_listener(event, listen)

    def _count(self, request: Request) -> None:
        self.num_ended += request.url.endswith("/completions")

    def open(self) -> ChatPage:
        self.page.goto(self.url)
        self.page.wait_for_selector("#model-name:not(:empty)")
        return self

    def find(self, selector: str, **which: str) -> Locator:
        return self.page.locator(selector, **which)

    def write(self, text: str) -> None:
        self.page.fill("#composer-text", text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> Locator:
        """Sends a message; returns the answer when it has ended."""
        self.write(text)
        self.wait_for_end()
        return self.last_answer

    def wait_for_end(self) -> None:
        """Returns when one more answer has ended."""
        for _ in range(1000):
            if self.num_ended > self.num_seen:
                break
            self.page.wait_for_timeout(20)  # in which the browser tells what happened
        self.num_seen += 1
        assert self.num_ended >= self.num_seen, "no answer has ended"
        self.wait_for_rest()

    def wait_for_rest(self) -> None:
        """Returns when there are messages, and nothing is being written."""
        self.page.wait_for_selector("article:last-child.assistant [data-act=regenerate]")
        self.page.wait_for_selector("#send:visible")

    @property
    def last_answer(self) -> Locator:
        return self.find("article.assistant").last

    def act(self, message: Locator, name: str) -> None:
        """Presses one of a message's buttons."""
        message.locator(f"footer [data-act={name}]").click()

    def texts(self) -> list[str]:
        """What each message says."""
        return [text.strip() for text in self.find("article .body").all_text_contents()]

    def wait_for_texts(self, expected: list[str]) -> None:
        for _ in range(750):
            if self.texts() == expected:
                return
            self.page.wait_for_timeout(20)
        assert self.texts() == expected

    def until(self, condition: str) -> None:
        """Waits for a JavaScript expression to become true. The page's policy forbids Playwright's own way to wait."""
        for _ in range(750):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"this never became true: {condition}")
