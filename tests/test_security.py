"""What docs/security.md promises: each of its tests is there, and the source holds nothing that it rules out."""

import ast
import re
import socket
from pathlib import Path

import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama
from llama.service import ENDPOINTS, Call, Refusal

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "::" in line
]
SOURCES = sorted((ROOT / "llama").rglob("*.py"))
FORBIDDEN = {  # calls by their last name: what each would let in
    "compile_command": "code", "Unpickler": "code",
    "broadcast_object_list": "pickles", "send_object_list": "pickles", "all_gather_object": "pickles",
    "scatter_object_list": "pickles", "recv_pyobj": "pickles", "rpc_sync": "pickles", "init_rpc": "pickles",
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_incident_has_a_test_that_is_there(row):
    assert len(row) == 4
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3]):
        defined = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")}
        assert name in defined, f"{file} has no {name}"


def test_the_table_has_all_of_them():
    assert len(ROWS) == 45


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_here_unpickles_runs_or_imports_what_it_was_given(path):
    for name, call in calls(path):
        last, options = name.rpartition(".")[2], {word.arg: word.value for word in call.keywords}
        assert last not in FORBIDDEN, f"{name}: {FORBIDDEN.get(last)}"
        assert "pickle_module" not in options
        assert "trust_remote_code" not in options
        assert not name.startswith("pickle.load")
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen")
        if name == "torch.load":
            assert ast.unparse(options["weights_only"]) == "True"
    assert "BaseHTTPMiddleware" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "fields",
    [
        dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.test/b"}}]}]),
        dict(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]),
        dict(prompt_embeds="AAAA"),
    ],
)
def test_what_a_client_sends_is_never_fetched_or_loaded(monkeypatch, fields):
    def connect(*arguments: object) -> None:
        raise AssertionError(f"a socket was asked for {arguments}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    llm = Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")
    body = {"model": "default", "messages": [{"role": "user", "content": "hi"}], **fields}
    with pytest.raises(Refusal):
        Call.open(llm, ENDPOINTS["/v1/chat/completions"], body)
