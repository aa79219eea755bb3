"""Who may ask: holders of a key, under the server's own names, and no page of another site.

A key is asked for on every path but those that are public: what is not listed is closed. The path is that of the
request's first line; nothing here is made from the Host header, which is the client's to choose (CVE-2026-48746).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.refusing import Header, refuse
from llama.service import Refusal

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.ASCII)  # a name or an address, and a port
FIELD_NAMES = re.compile(r"[\w.,\- ]{0,2000}", re.ASCII)  # what a preflight may list
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
ANY = "*"


@dataclass(frozen=True)
class AllowedHosts:
    """What may stand in a Host header, so that no name of an attacker's leads a browser here (DNS rebinding).

    A server for this machine alone goes by its loopback names. One that others reach goes by any address too, as no
    name has to be looked up for one; further `names` are given by whoever starts it, `*` for all.
    """

    names: frozenset[str]
    any_address: bool

    @classmethod
    def of(cls, bound: str, names: Iterable[str] = ()) -> AllowedHosts:
        """For a server that listens at `bound`, a name or an address."""
        own = frozenset(name.lower() for name in (bound, *names))
        return cls(own | {"localhost"}, any_address=not is_loopback(bound))

    def __contains__(self, header: object) -> bool:
        match = HOST.fullmatch(str(header).lower())
        if match is None:
            return False
        name = match[1].strip("[]")
        return ANY in self.names or name in self.names or is_loopback(name) or (self.any_address and is_address(name))


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback if is_address(host) else host == "localhost"


def digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


class Guard:
    """Middleware: lets a request through to `app`, or refuses it.

    `scope["state"]["key"]` is then the sha256 of the key that was given, if any is asked for, and `"is_admin"` says
    whether the admin's was, which opens what the others open too. Slashes that clients
    double where they join addresses are made one behind the check, so that they open nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: AllowedHosts,
        keys: Iterable[str] = (),
        admin_key: str | None = None,
        public: Iterable[str] = (),
        origins: Iterable[str] = (),
    ):
        self.app = app
        self.hosts = hosts
        self.keys = [digest(key) for key in keys]
        self.admin_key = None if admin_key is None else digest(admin_key)
        self.public = frozenset(public)
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        shared = self._shared(headers.get("origin"))
        send = with_headers(send, shared) if shared else send
        try:
            self._check_host(scope, headers)
            self._check_origin(scope, headers)
            if "access-control-request-method" in headers and scope["method"] == "OPTIONS":
                await allow(headers, send)
                return
            key, is_admin = self._check_key(scope, headers)
        except Refusal as refusal:
            asks = [(b"www-authenticate", b"Bearer")] if refusal.status == 401 else []
            await refuse(scope, send, refusal, asks)
            return
        state = {**scope.get("state", {}), "key": key, "is_admin": is_admin}
        path = re.sub("//+", "/", scope["path"])
        await self.app({**scope, "path": path, "state": state}, receive, send)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        given = headers.getlist("host")
        if not given and scope.get("http_version") == "1.0":  # probes of proxies; every browser sends it
            return
        if len(given) != 1 or HOST.fullmatch(given[0].lower()) is None:
            raise Refusal("the Host header is missing or malformed: give one name or address, with a port or without")
        if given[0] not in self.hosts:
            message = f"this server does not go by the name {given[0]}: start it with --allowed-hosts to change that"
            raise Refusal(message, status=403, kind="permission_error", code="host_not_allowed")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """A page of another site may neither change anything here nor read what is answered."""
        origin = headers.get("origin")
        if origin is None or self._shared(origin):
            return
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        is_own = origin.lower().partition("://")[2] == headers.get("host", "").lower()
        if is_preflight or (scope["method"] not in SAFE_METHODS and not is_own):
            message = f"pages of {origin[:200]} may not use this server: start it with --allowed-origins to change that"
            raise Refusal(message, status=403, kind="permission_error", code="origin_not_allowed")

    def _check_key(self, scope: Scope, headers: Headers) -> tuple[bytes | None, bool]:
        """The digest of the key that was given, and whether it is the admin's.

        Keys are compared as digests, in the same time wherever they differ.
        """
        found, is_admin = None, False
        given = given_keys(headers)
        for one in map(digest, given):
            if self.admin_key is not None and hmac.compare_digest(one, self.admin_key):
                found, is_admin = self.admin_key, True
            for key in self.keys:
                found = key if hmac.compare_digest(one, key) else found
        if not self.keys:
            return None, is_admin
        if found is None and scope["path"] not in self.public:
            wrong = "this API key is not known" if given else "an API key is missing"
            message = f"{wrong}: send one as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
            raise Refusal(message, status=401, kind="authentication_error", code="invalid_api_key")
        return found, is_admin

    def _shared(self, origin: str | None) -> list[Header]:
        """What lets a browser show an answer to a page of that origin; nothing where it may not."""
        if origin is None or not ({ANY, origin.lower()} & self.origins):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"vary", b"origin"),
        ]


async def allow(headers: Headers, send: Send) -> None:
    """Answers a preflight: a browser's question whether a page may send what it wants to."""
    wanted = headers.get("access-control-request-headers", "")
    answer = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", wanted.encode() if FIELD_NAMES.fullmatch(wanted) else b""),
        (b"access-control-allow-private-network", b"true"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body"})


def given_keys(headers: Headers) -> list[str]:
    bearers = [value.split(None, 1) for value in headers.getlist("authorization")]
    tokens = [parts[1].strip() for parts in bearers if len(parts) == 2 and parts[0].lower() == "bearer"]
    return tokens + headers.getlist("x-api-key")


def with_headers(send: Send, headers: list[Header]) -> Send:
    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return send_with
