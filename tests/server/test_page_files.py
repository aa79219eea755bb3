"""The page's files over HTTP: fixed names, kept by browsers, packed, under a policy, and small."""

import gzip
import re

import pytest
from support.server import Running, serving

from llama.server.page_files import FOLDER, PageFile, page_files


def test_every_file_of_the_page_is_served_and_nothing_else(running: Running):
    for path, file in page_files().items():
        response = running.open("GET", path, headers={"accept-encoding": "identity"})
        assert response.status == 200
        assert response.read() == file.content
        assert response.headers["content-type"] == file.type
        assert "default-src 'none'" in response.headers["content-security-policy"]
    for path in ("/page/", "/page/../settings.py", "/page/%2e%2e/settings.py", "/page/app.js", "/page/index.html"):
        assert running.open("GET", path).status == 404


@pytest.mark.parametrize("name", ["/", "/app.js", "/vendor/katex.js"])
def test_a_browser_that_has_a_file_gets_it_no_second_time(running: Running, name: str):
    [path] = [path for path in page_files() if path.endswith(name)]
    first = running.open("GET", path, headers={"accept-encoding": "gzip"})
    assert gzip.decompress(first.read()) == page_files()[path].content
    again = running.open("GET", path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status, again.read()) == (304, b"")
    assert running.open("HEAD", path).read() == b""


def test_the_page_opens_without_a_key_and_tells_that_one_is_needed():
    with serving(api_key=["secret"]) as locked:
        assert all(locked.open("GET", path).status == 200 for path in page_files())
        assert locked.open("GET", "/v1/models").status == 401


def test_the_page_is_small_and_every_library_has_its_licence():
    sizes = {path: len(file.content) for path, file in page_files().items()}
    assert sum(sizes.values()) < 1_000_000
    libraries = {path.stem for path in (FOLDER / "vendor").glob("*.js")}
    assert {path.stem for path in (FOLDER / "vendor").glob("*.LICENSE")} == libraries
    assert all(isinstance(file, PageFile) for file in page_files().values())


def test_what_the_page_needs_at_its_start_is_asked_for_at_once():
    index = (FOLDER / "index.html").read_text()
    named = set(re.findall(r'rel="modulepreload" href="page/([^"]+)"', index))
    needed, seen = ["app.js"], set()
    while needed:
        name = needed.pop()
        seen.add(name)
        imports = re.findall(r'^import (?:.* from )?"\./([^"]+)";', (FOLDER / name).read_text(), re.MULTILINE)
        needed += [found for found in imports if found not in seen]
    assert named == seen


def test_every_word_that_the_page_uses_is_there_in_both_languages():
    text = (FOLDER / "words.js").read_text()
    known = set(re.findall(r"^  (\w+): \[", text, re.MULTILINE))
    used = set()
    for path in [FOLDER / "index.html", *FOLDER.glob("*.js")]:
        used |= set(re.findall(r'\bt\("(\w+)"|data-t(?:-\w+)?="(\w+)"', path.read_text()))
    assert {a or b for a, b in used} <= known
