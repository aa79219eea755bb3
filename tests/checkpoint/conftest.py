import http.server
import threading

import pytest
from support.hub import Hub

from llama.checkpoint import resolve


@pytest.fixture
def hub(tmp_path):
    """A hub on the loopback interface, its files in `folder`; `fetch` resolves a name there."""
    (tmp_path / "repository").mkdir()
    handler = type("TheHub", (Hub,), {"folder": tmp_path / "repository", "requests": [], "objects": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    class Place:
        folder = handler.folder
        requests = handler.requests
        stand_in = handler
        endpoint = f"http://127.0.0.1:{server.server_port}"
        closed = False

        def fetch(self, name="org/name"):
            return resolve(name, endpoint=self.endpoint, cache_dir=tmp_path / "cache")

        def close(self):
            if not self.closed:
                server.shutdown()
                server.server_close()
                thread.join()
            self.closed = True

    place = Place()
    yield place
    place.close()
