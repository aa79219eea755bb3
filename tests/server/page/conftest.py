from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import CHROMIUM, NO_CHROMIUM, ChatPage, started_chromium
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


@pytest.fixture
def person(chromium: Any, scripted: Running) -> Iterator[ChatPage]:
    """Someone who has just opened the page, in a browser that knows nothing of it."""
    context = chromium.new_context(locale="en-US", viewport={"width": 1200, "height": 850})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat = ChatPage(context.new_page(), scripted.url).open()
    yield chat
    context.close()
    assert chat.complaints == []
    assert [url for url in chat.asked if not url.startswith((scripted.url, "blob:", "data:"))] == []
