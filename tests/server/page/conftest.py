import socket
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page
from support.browser import CHROMIUM, NO_CHROMIUM, ChatPage, forget, started_chromium
from support.page_scripts import SCRIPTS, says
from support.scripted import scripted_llm
from support.server import Running, serving


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    with started_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def scripted() -> Iterator[Running]:
    """A server whose model says what stands in `scripts`."""
    with serving(lambda: scripted_llm(SCRIPTS, says)) as running:
        yield running


@pytest.fixture(scope="module")
def window(chromium: Any) -> Iterator[Page]:
    """A window that all tests of a file have in turn, each with nothing of the others'."""
    context = chromium.new_context(locale="en-US")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context.new_page()
    context.close()


@pytest.fixture
def person(window: Page, scripted: Running) -> Iterator[ChatPage]:
    """Someone who opens the page for the first time."""
    window.goto("about:blank")
    window.set_viewport_size({"width": 1200, "height": 850})
    forget(window, scripted.url)
    chat = ChatPage(window, scripted.url)
    yield chat.open()
    chat.close()
    assert chat.complaints == []
    assert [url for url in chat.asked if not url.startswith((scripted.url, "blob:", "data:"))] == []


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]
