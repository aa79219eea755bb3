import hashlib
import http.server
import json
import os
import sys
import threading

import pytest
from support.checkpoints import assert_equal, sample, state, write_gguf, write_hf, write_meta

from llama.checkpoint import CheckpointError, open_checkpoint, resolve

pytest.importorskip("huggingface_hub")
COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs, over the files of one folder."""

    folder = None
    requests: list[str]

    def log_message(self, *args) -> None:
        self.requests.append(self.path)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        names = [file.relative_to(self.folder).as_posix() for file in files]
        if path.startswith("/api/models/org/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.digest(file)}
                for name, file in zip(names, files, strict=True)
            ]
            self.send(json.dumps(entries).encode(), with_body)
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in names]
            self.send(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif path.startswith(f"/org/name/resolve/{COMMIT}/") and path.split("/", 5)[5] in names:
            file = self.folder / path.split("/", 5)[5]
            self.send(
                file.read_bytes(), with_body, {"ETag": f'"{self.digest(file)}"', "X-Repo-Commit": COMMIT}
            )
        else:
            self.send(b"", with_body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def digest(self, file) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send(
        self, data: bytes, with_body: bool, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    """A hub on the loopback interface, its files in `folder`; `fetch` resolves a name there."""
    (tmp_path / "repository").mkdir()
    handler = type("TheHub", (Hub,), {"folder": tmp_path / "repository", "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    class Place:
        folder = handler.folder
        requests = handler.requests
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


def test_a_name_is_downloaded_and_opened(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights, 3)
    path = hub.fetch()
    assert_equal(state(path), weights)
    assert open_checkpoint(path).format == "hf"


@pytest.mark.parametrize("kind", ["meta", "gguf", "bin"])
def test_other_formats_are_downloaded_too(hub, kind):
    args, weights = sample()
    writers = {
        "meta": lambda: write_meta(hub.folder, args, weights, 2),
        "gguf": lambda: write_gguf(hub.folder / "m.gguf", args, weights),
        "bin": lambda: write_hf(hub.folder, args, weights, binary=True),
    }
    writers[kind]()
    assert_equal(state(hub.fetch()), weights)


def test_only_settings_and_one_kind_of_weights_are_fetched(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights)
    write_hf(hub.folder, args, weights, binary=True)
    write_meta(hub.folder / "original", args, weights)
    for name in ("modeling_evil.py", "README.md", "model.onnx"):
        (hub.folder / name).write_text("x")
    path = hub.fetch()
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert not [request for request in hub.requests if "evil" in request or "original" in request]


def test_a_download_is_used_again_without_the_network(hub):
    args, weights = sample()
    write_hf(hub.folder, args, weights)
    path = hub.fetch()
    hub.close()
    assert hub.fetch() == path
    assert_equal(state(path), weights)


def test_what_the_hub_does_not_know_or_cannot_give_is_one_line(hub):
    with pytest.raises(
        FileNotFoundError, match="org/other: no such directory here, and the hub does not"
    ) as error:
        hub.fetch("org/other")
    assert "\n" not in str(error.value)
    with pytest.raises(
        CheckpointError, match="org/name: the hub has it, but with no weights in a known format"
    ):
        hub.fetch()
    hub.close()
    with pytest.raises(
        FileNotFoundError, match="org/name: no such directory here, and the hub does not"
    ) as error:
        hub.fetch()
    assert "\n" not in str(error.value)


def test_without_the_package_the_error_is_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        resolve("org/name")


def test_a_path_that_exists_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(resolve("org/name")) == os.path.join("org", "name")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "name", ["/absent/model", "./org/name", "~/model", "model.gguf", "a/b/c", "../x", "org/"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="no such file or directory; give"):
        resolve(name)
