"""The chat page: its files in memory, under fixed names, each with what a browser needs to keep and to trust it."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
INDEX = "/"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".LICENSE": "text/plain; charset=utf-8",
}
PACKED = (".woff2",)  # by their own format

# Nothing runs, is shown or is asked but what this server sends; only the sanitizer may make HTML of text.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
FOR_EVER = "public, max-age=31536000, immutable"
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent. `packed`: the same by gzip, where that makes it smaller."""

    content: bytes
    type: str
    etag: str
    packed: bytes | None
    caching: str

    @classmethod
    def of(cls, content: bytes, suffix: str, caching: str) -> PageFile:
        packed = None if suffix in PACKED else gzip.compress(content, mtime=0)
        return cls(content, MEDIA_TYPES[suffix], f'"{digest_of(content)}"', packed, caching)

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "etag": self.etag, "cache-control": self.caching}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if self.packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
            return Response(self.packed, media_type=self.type, headers={**headers, "content-encoding": "gzip"})
        return Response(self.content, media_type=self.type, headers=headers)


def digest_of(content: bytes) -> str:
    return sha256(content).hexdigest()[:32]


@cache
def page_files() -> dict[str, PageFile]:
    """Every file by its path on the server; a path that is not here has no file, whatever it spells.

    The first asks for the others under a name that changes with them, so browsers keep those for ever.
    """
    paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in MEDIA_TYPES]
    contents = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths}
    version = digest_of(b"".join(contents.values()))[:12]
    index = contents.pop("index.html").replace(b'"page/', f'"page/{version}/'.encode())
    files = {INDEX: PageFile.of(index, ".html", "no-cache")}
    for name, content in contents.items():
        files[f"/page/{version}/{name}"] = PageFile.of(content, Path(name).suffix, FOR_EVER)
    return files


def add_page(app: FastAPI) -> None:
    """Serves them by GET and HEAD."""

    async def send(request: Request) -> Response:
        file = page_files().get(request.scope["path"])
        if file is None:
            raise HTTPException(404)
        return file.response(request)

    for path in (INDEX, "/page/{name:path}"):
        app.add_route(path, send, methods=["GET", "HEAD"], include_in_schema=False)
