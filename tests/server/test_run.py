import shutil
import socket
import ssl
import subprocess
from functools import partial
from http.client import BadStatusLine, HTTPSConnection

import pytest
from support.processes import server_processes
from support.server import serving, tiny_llm

from llama.server import run
from llama.server.run import bound, run_server
from llama.server.settings import ServerSettings


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The files of a certificate for localhost and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(made, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_what_constraints_need_is_there_before_the_first_request():
    """It holds every thread while it is made: nobody who streams is to wait for that."""
    with serving() as server:
        assert server.server.llm.engine._constraints._tokenizer is not None


def test_a_busy_port_is_named_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]

        def build():
            raise AssertionError("a model is loaded in vain")

        with pytest.raises(OSError, match=rf"cannot listen at 127.0.0.1 port {port}: .*give another --host or --port"):
            run_server(build, ServerSettings(port=port))


def test_no_packet_of_a_response_waits_until_the_client_has_acknowledged_another():
    with bound(ServerSettings(port=0)) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_host_that_nobody_knows_is_named_with_the_reason(monkeypatch):
    def look_up(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_server", look_up)
    with pytest.raises(OSError, match="cannot listen at nowhere port 8000: Name or service not known; give another"):
        bound(ServerSettings(host="nowhere"))


@pytest.mark.parametrize("port", ["-1", "65536", "seven"])
def test_a_port_that_is_none_is_a_wrong_call(llama, port):
    status, _, error = llama("serve", "--port", port)
    assert status == 2
    assert error.startswith("llama: Invalid value for '--port': ")
    assert len(error.splitlines()) == 1


def test_what_keeps_the_model_from_loading_is_raised():
    def build():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run_server(build, ServerSettings(port=0, quiet=True))


def test_a_certificate_makes_it_https(certificate):
    cert, key = certificate
    with serving(ssl_certfile=cert, ssl_keyfile=key) as running:
        trusting = ssl.create_default_context(cafile=str(cert))
        connection = HTTPSConnection("localhost", running.port, timeout=60, context=trusting)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        with pytest.raises((ConnectionError, BadStatusLine)):
            running.get("/health")


def test_a_wrong_certificate_is_told_before_a_model_is_loaded(tmp_path):
    wrong = tmp_path / "cert.pem"
    wrong.write_text("no certificate")
    with pytest.raises(OSError, match=r"cert.pem holds no certificate with its key, in PEM: give --ssl-certfile"):
        run_server(pytest.fail, ServerSettings(port=0, ssl_certfile=wrong))


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", ["k"], False), ("::1", None, False)]
)
def test_an_open_door_is_told(monkeypatch, host, key, warns):
    told = []
    monkeypatch.setattr(run, "tell", told.append)
    monkeypatch.setattr(run, "serve_on", lambda *args: None)
    monkeypatch.setattr(run.asyncio, "run", lambda nothing: None)
    run_server(pytest.fail, ServerSettings(host=host, port=0, api_key=key))
    assert [line for line in told if "whoever reaches 0.0.0.0 may use the model" in line] == told
    assert bool(told) is warns


def test_an_address_of_six_is_listened_at():
    try:
        with bound(ServerSettings(host="::1", port=0)) as listening:
            assert listening.family is socket.AF_INET6
    except OSError as error:
        assert "cannot listen at ::1" in str(error)  # noqa: PT017 (this machine has no such address)


def test_requests_are_told_in_lines_of_json():
    with server_processes(partial(tiny_llm), quiet=False) as server:
        connection = server.connection()
        connection.request("GET", "/version", headers={"x-request-id": "mine"})
        connection.getresponse().read()
        server.read_until('"request_id": "mine"')
