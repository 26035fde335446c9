"""Keeps other sites' pages out: of a server on localhost, every page in the browser is a client.

A page elsewhere can send requests here, and by a name that it lets resolve to this machine (DNS
rebinding) it could read the answers. So requests need a Host that no stranger can hold, and those
that change something an Origin that is this server.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The most bytes of a request's body; a verdict has less than 200.
MOST_BYTES = 10_000
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """An ASGI application around another, which answers what is allowed.

    Browsers may call this machine by these names, and always by number, since no other site's page
    has such an address.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]):
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request itself if it is not allowed, and hands it on if it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refused = self._refused(scope)
        await (refused or self._app)(scope, receive, send_guarded)

    def _refused(self, scope):
        """Returns the response to a request that is not allowed, or None."""
        headers = Headers(scope=scope)
        host = headers.getlist("host")
        if len(host) != 1 or not self._known(host[0].lower()):
            return PlainTextResponse(
                "This server does not go by that name; open it as http://localhost, or start it "
                "with --host and that name.\n",
                421,
            )
        if scope["method"] in ("GET", "HEAD"):
            return None
        origins = {f"{scheme}://{host[0].lower()}" for scheme in ("http", "https")}
        if headers.get("origin", "").lower() not in origins:
            return PlainTextResponse("Only this server's own pages may do that.\n", 403)
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return PlainTextResponse("Only this server's own pages may do that.\n", 403)
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return PlainTextResponse(f"Expected a body of at most {MOST_BYTES} bytes.\n", 413)
        return None

    def _known(self, host):
        parts = _HOST.fullmatch(host)
        if not parts:
            return False
        name = parts[1].strip("[]").rstrip(".")
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
