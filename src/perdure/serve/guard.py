"""What stands before every request: who may ask, and what browsers are told of every answer."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # the page brings a wider one of its own
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets those requests through that name this server as their host: a page elsewhere whose name was made to lead here (DNS
    rebinding) names itself. Bound to every address, any address will do, as no such page has one for a name."""

    def __init__(self, app: ASGIApp, bound: str):
        self.app, self.names = app, allowed(bound)
        self.addresses = bound in EVERYWHERE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        asked = Headers(scope=scope)
        app: ASGIApp = self.app
        if len(asked.getlist("host")) != 1 or not self.ours(f"//{asked['host']}"):
            app = no(
                "This server does not go by that name. Open it as 127.0.0.1 or localhost, or start it with --host."
            )
        elif asked.get("origin", "").lower() not in ("", f"http://{asked['host']}".lower()):
            app = no("Pages of other sites may not ask this server.")
        await app(scope, receive, guarded)

    def ours(self, address: str) -> bool:
        try:
            name = urlsplit(address).hostname or ""
        except ValueError:
            return False
        return name in self.names or (self.addresses and is_address(name))


def no(message: str) -> JSONResponse:
    return JSONResponse({"error": message}, 403, {"Connection": "close"})


def allowed(bound: str) -> frozenset[str]:
    """The names that a server bound to ``bound`` goes by."""
    own: Iterable[str] = (socket.gethostname(), socket.getfqdn()) if bound in EVERYWHERE else (bound,)
    return frozenset(name.lower().strip("[]") for name in (*LOOPBACK, *own) if name)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
