"""Who may ask, for what, and what every answer says about itself: one layer around the whole application."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Final, final
from urllib.parse import parse_qs

from starlette.responses import JSONResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Longest path and longest query that are looked at.
LONGEST_PATH, LONGEST_QUERY = 256, 512
#: A token that others could guess in time is refused.
SHORTEST_TOKEN: Final = 16

HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
)


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` can be reached from this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str, more: Collection[str] = ()) -> frozenset[str]:
    """Names by which a browser may call a server that is bound to ``host``, in lower case.

    A page of another site that lets its own name point to this machine (DNS rebinding) calls by that name, and is
    refused.
    """
    known = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more)}
    if not is_loopback(host):
        known |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(known)


@final
class Guard:
    """Refuses what is not meant for the application before it sees it.

    Parameters
    ----------
    app
        What is guarded.
    hosts
        Names of this server (`allowed_hosts`).
    token
        What every request must bring: as the query ``token`` of the first one, from then on as a cookie, or as
        ``Authorization: Bearer``. ``None``: nothing is asked for.
    any_address
        The server listens on every address of the machine, so that any address in digits is one of its names.

    Notes
    -----
    Only GET and HEAD pass. Tokens are compared in constant time. Every answer carries a content security policy that
    allows nothing but the page's own files.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: frozenset[str], token: str | None = None, any_address: bool = False
    ) -> None:
        self._app, self._hosts, self._any_address = app, hosts, any_address
        self._token = None if token is None else token.encode()
        # Cookies know no ports: two dashboards on one machine must not overwrite each other's.
        self.cookie = "kalmanguard"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(name, value) for name, value in HEADERS if name not in present]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] not in ("GET", "HEAD"):
            return refused(405, "The dashboard only shows: it answers GET and HEAD.")
        if len(scope["raw_path"] or b"") > LONGEST_PATH:
            return refused(414, f"The path is longer than {LONGEST_PATH} characters.")
        if len(scope["query_string"]) > LONGEST_QUERY:
            return refused(414, f"The query is longer than {LONGEST_QUERY} characters.")
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if not self._is_ours(headers.get(b"host", b"")):
            return refused(
                421,
                "This name is not one of the server's: open the address that it printed, or allow the name with "
                "--allow-host.",
            )
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and scope["path"] != "/":
            return refused(403, "Other sites may not ask.")
        return None if self._token is None else self._stranger(scope, headers, self._token)

    def _is_ours(self, header: bytes) -> bool:
        name = header.decode("latin-1").strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
        if name in self._hosts:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _stranger(self, scope: Scope, headers: dict[bytes, bytes], token: bytes) -> Response | None:
        server = scope.get("server") or ("", 0)
        cookie = f"{self.cookie}-{server[1]}"
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(bearer.strip(), token):
            return None
        try:
            known = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(cookie)
        except CookieError:
            known = None
        if known is not None and hmac.compare_digest(known.value.encode("latin-1", "replace"), token):
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.get("token", [""])[0].encode("utf-8", "replace")
        if scope["path"] == "/" and hmac.compare_digest(given, token):
            # The token leaves the address line, and so the history and what is sent along when a link is followed.
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(cookie, token.decode(), httponly=True, samesite="strict", path="/")
            return answer
        return refused(401, "A token is needed: open the address that the dashboard printed when it was started.")


def refused(status: int, text: str) -> JSONResponse:
    """An answer that says why not."""
    return JSONResponse({"error": text}, status_code=status)
