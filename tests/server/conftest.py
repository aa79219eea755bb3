from collections.abc import Iterator

import pytest
from support.server import Running, serving


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """A server of a tiny model with the default settings, for all tests of a file."""
    with serving() as server:
        yield server
